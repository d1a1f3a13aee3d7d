"""Kill or stop one process of a run at a random moment, many times, on one and on two hosts that this machine plays.

    python launch/kill_trials.py --model DIR --trials 100 --output results/kill_trials.json

Targets are a rank, launch.py, the runner, pdsh and our own command; signals KILL, STOP, TERM and INT; moments while the
model loads, runs, or its result is written. After --timeout-s and 10 seconds no process may be left; our own commands
may not exit with 0 without a complete result; a previous result may not be lost. The record has every trial; the exit
code is 1 where a bar is broken. Linux, root, openssh-server, pdsh and iproute2 are needed.
"""

from __future__ import annotations

import argparse
import sys

from ds_ring.cli import outputs
from ds_ring.cli.parser import LARGEST_SEED, Parser, whole
from ds_ring.errors import DsRingError, UserError
from ds_ring.process.interruption import ignore_here_alone
from ds_ring.utils import strict_json
from ds_ring.utils.plain_text import one_line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="a small checkpoint with a tokenizer")
    parser.add_argument("--trials", type=whole(1), default=100, metavar="N", help="[100]")
    parser.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0, metavar="N", help="[0]")
    # A run has two ranks, and every host at least one.
    hosts = "numbers of hosts [1 2]"
    parser.add_argument("--hosts", type=whole(1, 2), nargs="+", default=[1, 2], metavar="N", help=hosts)
    at_once = "trials at once, each on hosts of its own [1]"
    parser.add_argument("--at-once", type=whole(1, 64), default=1, metavar="N", help=at_once)
    parser.add_argument("--timeout-s", type=whole(1), default=15, metavar="N", help="of every run [15]")
    connect = "what a rank may take to read its packages, before its time-out counts; more on a busy machine [10]"
    parser.add_argument("--connect-s", type=whole(1), default=10, metavar="N", help=connect)
    parser.add_argument("--output", required=True, metavar="FILE.json", help="where to write the record")
    return parser


def main() -> None:
    ignore_here_alone()  # a shell's background job ignores SIGINT, and its trials are to get it
    try:
        args = make_parser().parse_args()
        outputs.check(args)
        found = _run(args)
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except DsRingError as error:
        print(f"failed: {one_line(str(error))}", file=sys.stderr)
        sys.exit(1)
    print(strict_json.dumps(found), flush=True)
    from benchmarks.faults.judge import BARS

    sys.exit(1 if any(found[bar] for bar in BARS) else 0)


def _run(args: argparse.Namespace) -> dict[str, object]:
    from benchmarks.faults.judge import summary
    from benchmarks.faults.trials import run_all
    from ds_ring.process.keeper import scratch_folder
    from ds_ring.utils import results

    with scratch_folder() as folder:
        document = results.collect(results.provenance(), run_all(args, folder), args.output)
    found = summary(document["rows"])
    results.write_complete(args.output, {**document, "summary": found})
    return found


if __name__ == "__main__":
    main()
