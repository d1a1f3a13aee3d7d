"""Time a layer's matrix products on one GPU, whole and a panel of rows at a time.

python launch/bench_products.py --model ds_configs/models/paper.json --panels 1280 2560 --output results/products.json
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

    from benchmarks.kernels import products
    from benchmarks.reports.kernel_tables import products_table
    from ds_ring.hf.attention import torch_dtype
    from ds_ring.hf.dims import model_dims
    from ds_ring.utils import device, results
    from ds_ring.utils.model_config import read_config
    from ds_ring.utils.progress import make_console

    cases = products.cases(model_dims(read_config(args.model)))
    if not torch.cuda.is_available():
        raise ConfigError("no CUDA GPU; this benchmark needs one")
    gpu = torch.device("cuda")
    torch.manual_seed(0)
    dtype = torch_dtype(args.dtype)
    rows = (
        row for m in args.rows for row in products.run(cases, m, args.panels, dtype, gpu, args.seconds, options.say)
    )
    document = {**results.provenance(), "device": device.device_name(gpu), "dtype": args.dtype}
    document = results.collect(document, rows, args.output)
    make_console().print(products_table(document["rows"]))
    return document


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint directory, or a file of ds_configs/models/")
    parser.add_argument(
        "--rows", type=whole(1), nargs="+", default=[10000], metavar="M", help="tokens at a time [10000]"
    )
    text = "rows of a panel; inputs of few rows may stay in the L2 cache"
    parser.add_argument("--panels", type=whole(1), nargs="+", required=True, metavar="M", help=text)
    parser.add_argument("--dtype", choices=[name for name in get_args(DType) if name != "fp32"], default="fp16")
    parser.add_argument("--seconds", type=number(above=True), default=2.0, help="how long each is sustained [2]")
    parser.add_argument("--output", metavar="FILE.json", help="where to write the result as well")
    return parser


def main() -> None:
    options.main(work, make_parser())


if __name__ == "__main__":
    main()
