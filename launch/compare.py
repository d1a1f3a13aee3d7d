"""Compare layouts on one model and text: the paper's table, as JSON, Markdown and a plot.

    python launch/compare.py --output results/demo.json
    python launch/compare.py --layouts ds_configs/gpu2/*.json --max-length 10000 --sweep 2048 32768
    python launch/compare.py --layouts ds_configs/gpu2/*.json --latency 10000 32768 131072

Runs each layout in turn under the deepspeed launcher and checks it against the unsharded model. Without --layouts,
those of ds_configs/ that fit the hardware. Overrides apply to every layout. With --latency: how long one sequence takes
in each, and in one GPU alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_ring import cli


def work(args: argparse.Namespace) -> dict[str, Any]:
    from ds_ring import compare, latency, plots, progress, report, results

    overrides = cli.overrides(args)
    files = args.layouts or ([args.config] if args.config else compare.default_layouts())
    plan = latency.plan(files, args.latency, overrides) if args.latency else compare.Plan.make(files, overrides)
    output, console = Path(args.output), progress.make_console()
    with progress.steps(console, plan.steps) as (advance, say):
        compare.ensure_checkpoint(plan.first, say)
        found = compare.run_all(plan, output.with_suffix(".logs"), advance, say)
    unfit = [f"{what['layout']} (out of memory at L = {what['length']})" for what in found.unfit]
    cli.require([*found.failures, *unfit] if not found.rows else [], "no layout ran: {}; see the logs by the output")
    rows = compare.judge(found.rows, args.baseline, found.unchecked)
    made = latency.document(plan, found, latency.judge(rows)) if args.latency else compare.document(plan, rows)
    document = results.provenance() | made
    results.write_json(output, document)
    results.write_atomically(output.with_suffix(".md"), (latency if args.latency else report).markdown(document))
    (plots.draw_latency if args.latency else plots.draw)(document, output.with_suffix(".png"))
    console.print(latency.terminal_table(document) if args.latency else report.terminal_table(document["rows"]))
    console.print(f"written: {output}, {output.with_suffix('.md')}, {output.with_suffix('.png')}")
    # That a layout does not hold a sequence is a result where it is asked how long each takes, and else a failure.
    failures = found.failures if args.latency else [*found.failures, *unfit]
    cli.require(failures, "these layouts failed, see the logs by the output: {}")
    cli.require(compare.disagreeing(rows), "not the unsharded model's result: {}")
    return document


if __name__ == "__main__":
    parser = cli.run_parser(__doc__)
    parser.set_defaults(output="results/compare.json")
    parser.add_argument("--layouts", nargs="+", metavar="FILE", help="configurations to compare")
    parser.add_argument("--baseline", metavar="NAME", help="what gains refer to [fastest tensor/pipeline layout]")
    latencies = "time one sequence of each of these lengths instead; what does not fit is a cell of the table"
    parser.add_argument("--latency", nargs="+", type=int, metavar="L", help=latencies)
    cli.main(work, parser)
