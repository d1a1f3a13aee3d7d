"""Compare layouts on one model and text: the paper's table, as JSON, Markdown and a plot.

    python launch/compare.py --output results/demo.json
    python launch/compare.py --layouts ds_configs/gpu2/*.json --max-length 10000 --sweep 2048 32768
    python launch/compare.py --layouts ds_configs/gpu2/*.json --latency 10000 32768 131072

Runs each layout in turn under the deepspeed launcher and checks it against the unsharded model. Without --layouts,
those of ds_configs/ that fit the hardware. Overrides apply to every layout. The layouts of ds_configs/peers2/ are other
implementations. With --micro-batch-sizes: each layout with each size, and the fastest stands for it. With
--there-and-back: once more afterwards, last to first, and the means of both count, so that GPUs that get warm favour no
layout; what communication costs is measured on that way. With --latency: how long one sequence takes in each, and in
one GPU alone. Interrupted, it leaves the rows that there are, and "not_run" lists the other layouts.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_ring.cli import options


def work(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.layouts import compare, latency, rank_rows, run_queue
    from benchmarks.reports import plots, tables
    from ds_ring.utils import progress, results

    overrides = options.overrides(args)
    files = args.layouts or ([args.config] if args.config else compare.default_layouts())
    plan = latency.plan(files, args.latency, overrides) if args.latency else compare.Comparison.make(files, overrides)
    plan = replace(plan, there_and_back=args.there_and_back)
    if args.baseline is not None:
        plan.check_baseline(args.baseline)
    output, console, provenance = Path(args.output), progress.make_console(), results.provenance()

    def keep(found: run_queue.Findings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        failed = found.without_row
        options.require([] if found.rows else list(map(said, failed)), "no layout ran: {}; see the logs by the output")
        rows = rank_rows.judge(found.rows, args.baseline, found.unchecked)
        made = latency.document(plan, found, latency.judge(rows)) if args.latency else None
        document = provenance | (made or rank_rows.document(plan, rows, failed))
        document |= {"not_run": found.not_run} if found.not_run else {}
        for earlier in (output.with_suffix(".md"), output.with_suffix(".png")):
            earlier.unlink(missing_ok=True)  # they would pass for this run's
        results.write_json(output, document)
        return rows, document

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a time limit leaves what there is
    with progress.steps(console, plan.steps) as (advance, say):
        compare.ensure_checkpoint(plan.first, say)
        found = compare.run_all(plan, output.with_suffix(".logs"), advance, say, keep)
    failed, (rows, document) = found.without_row, keep(found)
    results.write_atomically(output.with_suffix(".md"), (latency if args.latency else tables).markdown(document))
    (plots.draw_latency if args.latency else plots.draw)(document, output.with_suffix(".png"))
    console.print(latency.terminal_table(document) if args.latency else tables.terminal_table(document["rows"], failed))
    console.print(f"written: {output}, {output.with_suffix('.md')}, {output.with_suffix('.png')}")
    # That a layout does not hold a sequence is a result where it is asked how long each takes, and else a failure.
    failures = rank_rows.ours(found.failures if args.latency else failed)
    options.require(list(map(said, failures)), "these layouts failed, see the logs by the output: {}")
    options.require(rank_rows.disagreeing(rows), "not the unsharded model's result: {}")
    return document


def said(failure: dict[str, Any]) -> str:
    return f"{failure['layout']} ({failure['reason']})"


if __name__ == "__main__":
    parser = options.run_parser(__doc__)
    parser.set_defaults(output="results/compare.json")
    parser.add_argument("--layouts", nargs="+", metavar="FILE", help="configurations to compare")
    parser.add_argument("--baseline", metavar="NAME", help="what gains refer to [fastest tensor/pipeline layout]")
    both = "time each layout once more afterwards, last to first, at its fastest size of micro-batches"
    parser.add_argument("--there-and-back", action="store_true", help=both)
    latencies = "time one sequence of each of these lengths instead; what does not fit is a cell of the table"
    parser.add_argument("--latency", nargs="+", type=int, metavar="L", help=latencies)
    options.main(work, parser)
