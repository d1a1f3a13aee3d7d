"""Profile attention512 with Nsight Compute: what bounds it in each case.

python launch/profile_attention.py --only d512 --kind self 'zigzag rank' --output results/attention_profile_h100.json
"""

from __future__ import annotations

import argparse
from typing import Any

from ds_ring.cli import options
from ds_ring.cli.parser import Parser
from ds_ring.errors import ConfigError
from ds_ring.process.launcher import ROOT

SCRIPT = ROOT / "launch" / "profile_attention.py"


def work(args: argparse.Namespace) -> dict[str, Any] | None:
    import torch

    from benchmarks.kernels import attention_cases, attention_profile
    from ds_ring.kernels.attention512 import HEAD_DIM
    from ds_ring.utils import device, results

    cases = attention_cases.select(attention_cases.default_cases(), args.only, args.kind)
    selected = [case for case in cases if case.head_dim == HEAD_DIM]
    if not selected:
        raise ConfigError(f"no case of head_dim {HEAD_DIM} has all of these in its name; bench_attention.py --list")
    if not torch.cuda.is_available():
        raise ConfigError("no CUDA GPU; this benchmark needs one")
    gpu = torch.device("cuda")
    torch.manual_seed(0)
    if args.calls:
        attention_profile.calls(selected, gpu)
        return None
    words = [word for name in ("only", "kind") if getattr(args, name) for word in (f"--{name}", *getattr(args, name))]
    rows = attention_profile.run(selected, str(SCRIPT), [*words, "--calls"], options.say)
    document = {**results.provenance(), "device": device.device_name(gpu)}
    return results.collect(document, rows, args.output)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases with all of these in their name")
    parser.add_argument("--kind", nargs="+", default=[], metavar="WORD", help="cases of a kind with one of these in it")
    parser.add_argument("--calls", action="store_true", help="only make the calls, for the profiler around them")
    parser.add_argument("--output", metavar="FILE.json", help="where to write the result as well")
    return parser


def main() -> None:
    options.main(work, make_parser())


if __name__ == "__main__":
    main()
