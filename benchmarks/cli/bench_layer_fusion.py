"""Time decoder layers on one GPU: as transformers has them, by our fusion, and by torch.compile of each layer.

python launch/bench_layer_fusion.py --output results/layer_fusion.json
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any, get_args

from ds_ring.cli import options
from ds_ring.cli.parser import Parser, number, whole
from ds_ring.config import DType
from ds_ring.errors import ConfigError

CASES = [("ds_configs/models/paper.json", "2", "10000"), ("ds_configs/models/llama_wide.json", "1", "32768")]
MODES = ("default", "max-autotune-no-cudagraphs")


def work(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks.kernels import layer_fusion
    from benchmarks.reports.kernel_tables import layer_fusion_table
    from ds_ring.engine.connect import local_device
    from ds_ring.hf.attention import torch_dtype
    from ds_ring.utils import device, results
    from ds_ring.utils.progress import make_console

    cases = [_case(*words) for words in args.case or CASES]
    gpu = local_device()
    torch.manual_seed(0)
    effort = layer_fusion.Effort(args.seconds, args.rounds, args.backend)
    document = {**results.provenance(), "device": device.device_name(gpu), "dtype": args.dtype}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty: what an earlier run compiled would take no time
        rows = layer_fusion.run(cases, args.modes, torch_dtype(args.dtype), gpu, effort, options.say)
        document = results.collect({**document, "backend": args.backend}, rows, args.output)
    make_console().print(layer_fusion_table(document["rows"]))
    return document


def _case(model: str, *numbers: str) -> Any:
    from benchmarks.kernels.layer_fusion import Case

    try:
        batch, length = map(int, numbers)
    except ValueError:
        raise ConfigError(f"--case {model} {' '.join(numbers)}: BATCH and LENGTH are whole numbers") from None
    if batch < 1 or length < 4:
        raise ConfigError(f"--case {model} {batch} {length}: at least one sequence of four tokens")
    return Case(model, batch, length)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    text = "config file or checkpoint directory, sequences, tokens each; may be repeated [the paper's model 2 10000, "
    text += "llama_wide 1 32768]"
    parser.add_argument("--case", nargs=3, action="append", metavar=("MODEL", "BATCH", "LENGTH"), help=text)
    text = "of torch.compile, each a variant; max-autotune takes minutes [default]"
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["default"], help=text)
    parser.add_argument("--backend", default="inductor", help="of torch.compile; aot_eager compiles nothing [inductor]")
    parser.add_argument("--dtype", choices=get_args(DType), default="fp16")
    parser.add_argument(
        "--seconds", type=number(above=True), default=8.0, help="how long each variant is sustained in a case [8]"
    )
    parser.add_argument("--rounds", type=whole(1), default=4, metavar="N", help="in so many turns [4]")
    parser.add_argument("--output", metavar="FILE.json", help="where to write the result as well")
    return parser


def main() -> None:
    options.main(work, make_parser())


if __name__ == "__main__":
    main()
