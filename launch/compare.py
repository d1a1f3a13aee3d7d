"""Compare layouts on one model and text: the paper's table, as JSON, Markdown and a plot.

    python launch/compare.py --output results/demo.json
    python launch/compare.py --layouts ds_configs/gpu2/*.json --lengths 2048 10000 32768 --output results/x.json

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
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from ds_ring import compare, plots, report, results

    overrides, options = cli.passed_on(args)
    plan = compare.Plan.make(args.layouts or compare.default_layouts(), overrides, args.lengths)
    output = Path(args.output)
    console = Console(stderr=True)
    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(plan.lengths) + len(plan.runs))

        def say(text: str) -> None:
            progress.update(task, description=text)
            console.log(text)

        compare.ensure_checkpoint(plan.first, say)
        rows = compare.run_all(plan, options, output.with_suffix(".logs"), lambda: progress.advance(task), say)
    rows = compare.judge(rows, args.baseline)
    document = {**results.provenance(), "config": plan.first.document()}
    document |= {"rows": [r for r in rows if r["length"] == plan.lengths[-1]], "sweep": rows}
    results.write_json(output, document)
    results.write_atomically(output.with_suffix(".md"), report.markdown(document))
    plots.draw(document, output.with_suffix(".png"))
    console.print(report.terminal_table(document["rows"]))
    console.print(f"written: {output}, {output.with_suffix('.md')}, {output.with_suffix('.png')}")
    cli.require([r["layout"] for r in rows if not r["agrees"]], "differs from the unsharded model: {}")
    return document


if __name__ == "__main__":
    parser = cli.run_parser(__doc__)
    parser.set_defaults(output="results/compare.json")
    parser.add_argument("--layouts", nargs="+", metavar="FILE", help="configurations to compare")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="L", help="sequence lengths; the table shows the longest"
    )
    parser.add_argument(
        "--baseline", metavar="LAYOUT", help="what improvements refer to [fastest tensor/pipeline layout]"
    )
    cli.main(work, parser)
