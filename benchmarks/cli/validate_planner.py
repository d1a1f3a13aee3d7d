"""Hold the planner's predictions against every recorded step, on CPUs, in seconds.

    python launch/validate_planner.py --output results/planner.json
    python launch/validate_planner.py --fit       the constants, anew from the records

Which steps constants are fitted on is one rule (benchmarks/planner/cases.py); errors count on all others. The last line
of standard output is the document of which ``launch/performance.py`` makes a table and a picture.
"""

from __future__ import annotations

import argparse
from typing import Any

from ds_ring.cli import options
from ds_ring.cli.parser import Parser


def work(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.planner import fit, measured, validation
    from ds_ring.utils import results

    if args.fit:
        found = measured.measured()
        of_heads = measured.attention()
        return {
            **results.provenance(),
            "measured": {**found, "attention_in_steps": measured.attention_in_steps(of_heads[512])},
            "attention": {str(head_dim): rate for head_dim, rate in of_heads.items()},
            "fitted": fit.fitted(),
        }
    document = validation.document()
    for row in document["rows"][:2]:
        options.say(
            f"{row['of']}: {row['steps']} steps, median error {row['median_error']:.1%}, worst "
            f"{row['worst_error']:.1%}; "
            f"{row['wrong_order']} of {row['pairs']} pairs in the wrong order"
        )
    return {**results.provenance(), **document}


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--output", metavar="FILE.json", help="where to write the result as well")
    parser.add_argument("--fit", action="store_true", help="print the constants that the records give instead")
    return parser


def main() -> None:
    options.main(work, make_parser())


if __name__ == "__main__":
    main()
