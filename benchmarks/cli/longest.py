"""The longest single sequence that a layout holds, by forwards that complete or run out of memory.

    python launch/longest.py --config ds_configs/gpu2/ring2.json --max-length 131072 --output results/longest_ring2.json

Starts the deepspeed launcher for every attempt: twice --max-length while that fits, then between what fits and what
does not. The last line of standard output is one JSON document: "longest", with its length, seconds, tokens_per_second
and each rank's peak_memory_gib, and all attempts.
"""

from __future__ import annotations

import argparse
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_ring.cli import options
from ds_ring.cli.parser import Parser, number


def work(args: argparse.Namespace) -> dict[str, Any]:
    config = options.run_config(args)
    from benchmarks.baselines import load
    from benchmarks.layouts import max_length
    from ds_ring.utils import progress, results

    options.check_outputs(args, config)
    if args.attempt:
        return asdict(max_length.attempt_here(load.from_pretrained(config), args.memory_limit))
    console = progress.make_console()
    return max_length.find(
        config, granularity=args.granularity, memory_limit_gib=args.memory_limit, limit_s=args.limit,
        output=Path(args.output), provenance=results.provenance(), report=console.log,
    )  # fmt: skip


def make_parser() -> Parser:
    parser = options.run_parser(__doc__)
    parser.set_defaults(output="results/longest.json")
    bracket = "how near the result is to what does not fit, as a share of it [0.02]"
    parser.add_argument("--granularity", type=number(0, 1, above=True), default=0.02, metavar="SHARE", help=bracket)
    parser.add_argument(
        "--limit",
        type=number(0, threading.TIMEOUT_MAX, above=True),
        default=900.0,
        metavar="SECONDS",
        help="of one attempt [900]",
    )
    memory = "as if each rank's device had no more; on a CPU, on top of what the process uses anyway"
    parser.add_argument("--memory-limit", type=number(above=True), metavar="GIB", help=memory)
    parser.add_argument("--attempt", action="store_true", help=argparse.SUPPRESS)  # what each launch runs
    return parser


def main() -> None:
    options.main(work, make_parser(), beside=(".logs",))


if __name__ == "__main__":
    main()
