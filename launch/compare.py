"""Compare layouts on one model and text: the paper's table, as JSON, Markdown and a plot.

    python launch/compare.py --output results/demo.json
    python launch/compare.py --layouts ds_configs/gpu2/*.json --max-length 10000 --sweep 2048 32768

Runs each layout in turn under the deepspeed launcher and checks it against the unsharded model. Without --layouts,
those of ds_configs/ that fit the hardware. Overrides apply to every layout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_ring import cli


def work(args: argparse.Namespace) -> dict[str, Any]:
    from ds_ring import compare, plots, progress, report, results

    overrides, options = cli.passed_on(args)
    plan = compare.Plan.make(args.layouts or ([args.config] if args.config else compare.default_layouts()), overrides)
    output = Path(args.output)
    console = progress.make_console()
    with progress.steps(console, plan.steps) as (advance, say):
        compare.ensure_checkpoint(plan.first, say)
        rows, failures = compare.run_all(plan, options, output.with_suffix(".logs"), advance, say)
    cli.require(failures if not rows else [], "no layout ran: {} failed; see the logs beside the output")
    document = results.provenance() | compare.document(plan, compare.judge(rows, args.baseline))
    results.write_json(output, document)
    results.write_atomically(output.with_suffix(".md"), report.markdown(document))
    plots.draw(document, output.with_suffix(".png"))
    console.print(report.terminal_table(document["rows"]))
    console.print(f"written: {output}, {output.with_suffix('.md')}, {output.with_suffix('.png')}")
    cli.require(failures, "these layouts failed, see the logs beside the output: {}")
    cli.require(compare.disagreeing(document), "not the unsharded model's result: {}")
    return document


if __name__ == "__main__":
    parser = cli.run_parser(__doc__)
    parser.set_defaults(output="results/compare.json")
    parser.add_argument("--layouts", nargs="+", metavar="FILE", help="configurations to compare")
    parser.add_argument("--baseline", metavar="NAME", help="what gains refer to [fastest tensor/pipeline layout]")
    cli.main(work, parser)
