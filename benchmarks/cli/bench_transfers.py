"""Time a layer's matrix products while GPUs pull from each other: what transfers cost at the power limit.

python launch/bench_transfers.py --gpus 2 --model ds_configs/models/paper.json --output results/transfers_gpu2.json
"""

from __future__ import annotations

import argparse
from typing import Any, get_args

from ds_ring.cli import options
from ds_ring.cli.parser import Parser, number, whole
from ds_ring.config import DType
from ds_ring.errors import ConfigError


def work(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks.kernels import transfers
    from benchmarks.layouts import gpu_telemetry
    from benchmarks.reports.kernel_tables import transfers_table
    from ds_ring.hf.attention import torch_dtype
    from ds_ring.hf.dims import model_dims
    from ds_ring.utils import device, results
    from ds_ring.utils.model_config import read_config
    from ds_ring.utils.progress import make_console

    dims = model_dims(read_config(args.model))
    if (count := torch.cuda.device_count()) < args.gpus:
        raise ConfigError(f"{count} CUDA GPUs, {args.gpus} are wanted; they must reach each other's memory")
    gpus = [torch.device("cuda", index) for index in range(args.gpus)]
    torch.manual_seed(0)
    rows = transfers.run(dims, args.rows, torch_dtype(args.dtype), gpus, args.seconds, args.warm_s, options.say)
    general = {
        "device": device.device_name(gpus[0]), "gpus": args.gpus, "dtype": args.dtype, "tokens": args.rows,
        "link_sleeps_after_ms": gpu_telemetry.link_sleeps_after_ms(gpus[0]),
    }  # fmt: skip
    document = results.collect({**results.provenance(), **general}, rows, args.output)
    make_console().print(transfers_table(document["rows"]))
    return document


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint directory, or a file of ds_configs/models/")
    parser.add_argument(
        "--gpus", type=whole(2, 1 << 16), default=2, metavar="N", help="of one host, each pulls from the next [2]"
    )
    parser.add_argument(
        "--rows", type=whole(1), default=10000, metavar="M", help="tokens at a time on each GPU [10000]"
    )
    parser.add_argument("--dtype", choices=[name for name in get_args(DType) if name != "fp32"], default="fp16")
    parser.add_argument(
        "--seconds", type=number(above=True), default=6.0, help="how long each traffic is sustained [6]"
    )
    parser.add_argument("--warm-s", type=number(), default=20.0, help="how long products run alone before [20]")
    parser.add_argument("--output", metavar="FILE.json", help="where to write the result as well")
    return parser


def main() -> None:
    options.main(work, make_parser())


if __name__ == "__main__":
    main()
