"""Write docs/performance.md and its pictures from the recorded results.

    python launch/performance.py
    python launch/performance.py --record --limit-s 1500    first make what is missing, as far as GPUs and time allow

What it shows is in benchmarks/page.json: results files by section, what was wanted of them, and the commands for those
that do not exist yet. The last line of standard output tells what was met, missed and not measured.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ds_ring.cli import options


def work(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.reports import page, record
    from ds_ring.process.launcher import gpu_count

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what it started ends with it
    made = {} if args.record is None else record.record(ROOT, args.record, args.limit_s, gpu_count(), options.say)
    return {**made, **page.write(ROOT)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(output=None)
    text = "run the commands of these records, or of all that are missing, and keep what they give"
    parser.add_argument("--record", nargs="*", metavar="FILE.json", help=text)
    parser.add_argument(
        "--limit-s", type=float, default=threading.TIMEOUT_MAX, metavar="S", help="begin nothing behind this, and end"
    )
    options.main(work, parser)
