"""Look for what stands in the way of a run here: packages, launcher, port, hosts, GPUs, kernels and, with --config or
--model, the configuration. Starts nothing.

    ds-ring doctor --config ds_configs/gpu2/ring2.json --hostfile hosts

The last line of standard output is one JSON document; the exit code is 2 where there is a problem.
"""

from __future__ import annotations

import argparse
from typing import Any

from ds_ring.cli import options
from ds_ring.cli.parser import Parser, whole


def work(args: argparse.Namespace) -> dict[str, Any]:
    from ds_ring.cli import doctor_checks, findings
    from ds_ring.errors import UserError

    run, wrong = None, []
    try:
        run = options.run_config(args) if args.config or args.model else None
    except UserError as error:
        wrong = [findings.Finding("configuration", "problem", str(error))]
    found = [*doctor_checks.examine(run, args.hostfile, args.master_port), *wrong]
    findings.show(found)
    document = findings.document(found)
    if document["problems"]:
        raise options.Refused(f"{document['problems']} of {len(found)} checks found a problem", document)
    return document


def make_parser() -> Parser:
    parser = options.run_parser(__doc__)
    parser.add_argument("--hostfile", metavar="FILE", help="as for the deepspeed launcher")
    parser.add_argument(
        "--master-port", type=whole(1, 65535), default=29500, metavar="N", help="the launcher's port [29500]"
    )
    return parser


def main() -> None:
    options.main(work, make_parser())


if __name__ == "__main__":
    main()
