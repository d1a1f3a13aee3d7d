"""Time one block of attention on one GPU: every implementation at hand, each in turn with a matrix product.

python launch/bench_attention.py --list
python launch/bench_attention.py --only d512 causal --impl ds_ring flex --output results/attention.json
"""

from __future__ import annotations

import argparse
from typing import Any

from ds_ring.cli import options
from ds_ring.cli.parser import Parser, number
from ds_ring.errors import ConfigError


def work(args: argparse.Namespace) -> dict[str, Any] | None:
    import torch

    from benchmarks.kernels import attention_cases
    from benchmarks.kernels.attention_run import run
    from benchmarks.reports.kernel_tables import attention_table
    from ds_ring.utils import device, results
    from ds_ring.utils.progress import make_console

    selected = attention_cases.select(attention_cases.default_cases(), args.only, args.kind)
    if not selected:
        raise ConfigError("no case has all of these in its name; --list shows the names")
    if args.list:
        print("\n".join(case.label for case in selected))
        return None
    if not torch.cuda.is_available():
        raise ConfigError("no CUDA GPU; this benchmark needs one")
    gpu = torch.device("cuda")
    torch.manual_seed(0)
    rows = run(selected, gpu, args.seconds, options.say, names=args.impl)
    document = {**results.provenance(), "device": device.device_name(gpu)}
    document = results.collect(document, rows, args.output)
    if not document["rows"]:
        raise ConfigError(f"no implementation is called {' or '.join(args.impl)}")
    make_console().print(attention_table(document["rows"]))
    return document


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--list", action="store_true", help="print the cases' names and do nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases with all of these in their name")
    parser.add_argument("--kind", nargs="+", default=[], metavar="WORD", help="cases of a kind with one of these in it")
    parser.add_argument("--impl", nargs="+", default=[], metavar="WORD", help="implementations with one of these in it")
    seconds = "how long each implementation, and the product, is sustained [2]"
    parser.add_argument("--seconds", type=number(above=True), default=2.0, help=seconds)
    parser.add_argument("--output", metavar="FILE.json", help="where to write the result as well")
    return parser


def main() -> None:
    options.main(work, make_parser())


if __name__ == "__main__":
    main()
