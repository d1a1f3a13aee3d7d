"""Write docs/performance.md and its pictures from the recorded results.

    python launch/performance.py
    python launch/performance.py --record --limit-s 1500    first make what is missing, as far as GPUs and time allow

What it shows is in benchmarks/page.json: results files by section, the targets for their figures, and the commands for
those that do not exist yet. The last line of standard output lists which targets were met and missed, and which files
are not there yet.
"""

from __future__ import annotations

import argparse
import threading
from typing import Any

from ds_ring.cli import options
from ds_ring.cli.parser import Parser, number
from ds_ring.process.launcher import ROOT, gpu_count


def work(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.reports import page, record

    made = {} if args.record is None else record.record(ROOT, args.record, args.limit_s, gpu_count(), options.say)
    return {**made, **page.write(ROOT)}


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.set_defaults(output=None)
    text = "run the commands of these records, or of all that are missing, and keep what they give"
    parser.add_argument("--record", nargs="*", metavar="FILE.json", help=text)
    limit = "start no command after this many seconds, and end"
    parser.add_argument(
        "--limit-s", type=number(0, threading.TIMEOUT_MAX), default=threading.TIMEOUT_MAX, metavar="S", help=limit
    )
    return parser


def main() -> None:
    options.main(work, make_parser())


if __name__ == "__main__":
    main()
