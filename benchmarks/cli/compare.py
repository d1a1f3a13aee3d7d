"""Compare layouts on one model and text: the paper's table, as JSON, Markdown and a plot.

    python launch/compare.py --output results/demo.json
    python launch/compare.py --layouts ds_configs/gpu2/*.json --max-length 10000 --sweep 2048 32768
    python launch/compare.py --layouts ds_configs/gpu2/*.json --latency 10000 32768 131072

Runs each layout in turn under the deepspeed launcher and checks it against the unsharded model. Without --layouts, it
takes those of ds_configs/ that fit the hardware. Overrides apply to every layout. The layouts of ds_configs/baselines2/
are other projects' implementations. With --micro-batch-sizes: times each layout with each size, and shows the fastest.
With --there-and-back: times all layouts once more in reverse order and shows the means, so that warm GPUs favour no
layout; what communication costs is measured the second time. With --latency: times one sequence in each layout, and
on one GPU alone. After each layout the rows so far are in NAME.partial.json beside the output, which stays what it was
until the end; in that of an interrupted comparison "not_run" lists the other layouts.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_ring.cli import options
from ds_ring.cli.parser import Parser, whole
from ds_ring.errors import OutputError


def work(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.layouts import checkpoint, compare, latency, rank_rows
    from benchmarks.layouts.run_queue import QueueResults
    from benchmarks.reports import comparison_table, latency_table, plots
    from ds_ring.utils import progress, results
    from ds_ring.utils.output_file import write_atomically

    overrides = options.overrides(args)
    files = args.layouts or ([args.config] if args.config else compare.default_layouts())
    if args.latency:
        comparison = latency.comparison(files, args.latency, overrides)
    else:
        comparison = compare.Comparison.make(files, overrides)
    comparison = replace(comparison, there_and_back=args.there_and_back)
    options.check_outputs(args, comparison.first)
    if args.baseline is not None:
        comparison.check_baseline(args.baseline)
    output, console, provenance = Path(args.output), progress.make_console(), results.provenance()

    def document_of(found: QueueResults) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(all rows, what was found so far as JSON)."""
        failed, rows = found.all_failures, rank_rows.add_ratios(found.rows, args.baseline, found.unchecked)
        if args.latency:
            document = provenance | latency.document(comparison, found, latency.add_ratios(rows))
        else:
            document = provenance | rank_rows.document(comparison, rows, failed)
        return rows, document | ({"not_run": found.not_run} if found.not_run else {})

    def keep(found: QueueResults) -> None:
        results.write_partial(output, document_of(found)[1])

    with progress.steps(console, comparison.steps) as (advance, say):
        checkpoint.ensure(comparison.first, say)
        found = compare.run_all(comparison, output.with_suffix(".logs"), advance, say, keep)
    failed = found.all_failures
    options.require([] if found.rows else list(map(_said, failed)), "no layout ran: {}; see the logs by the output")
    rows, document = document_of(found)
    try:
        document = results.write_complete(output, document)
    except OutputError:
        return document  # printed all the same; options.main says what went wrong
    for earlier in (output.with_suffix(".md"), output.with_suffix(".png")):
        earlier.unlink(missing_ok=True)  # of an earlier comparison: nobody should take them for this one's
    write_atomically(
        output.with_suffix(".md"), (latency_table if args.latency else comparison_table).markdown(document)
    )
    (plots.draw_latency if args.latency else plots.draw)(document, output.with_suffix(".png"))
    if args.latency:
        console.print(latency_table.terminal_table(document))
    else:
        console.print(comparison_table.terminal_table(document["rows"], failed))
    console.print(f"written: {output}, {output.with_suffix('.md')}, {output.with_suffix('.png')}")
    # With --latency, that a sequence does not fit is a result. Otherwise it is a failure.
    failures = rank_rows.ours(found.failures if args.latency else failed)
    options.require(list(map(_said, failures)), "these layouts failed, see the logs by the output: {}")
    options.require(rank_rows.disagreeing(rows), "not the unsharded model's result: {}")
    return document


def _said(failure: dict[str, Any]) -> str:
    return f"{failure['layout']} ({failure['reason']})"


def make_parser() -> Parser:
    parser = options.run_parser(__doc__)
    parser.set_defaults(output="results/compare.json")
    parser.add_argument("--layouts", nargs="+", metavar="FILE", help="configurations to compare")
    parser.add_argument("--baseline", metavar="NAME", help="what gains refer to [fastest tensor/pipeline layout]")
    both = "time each layout once more afterwards, last to first, at its fastest size of micro-batches"
    parser.add_argument("--there-and-back", action="store_true", help=both)
    latencies = "time one sequence of each of these lengths instead; what does not fit is a cell of the table"
    parser.add_argument("--latency", nargs="+", type=whole(1), metavar="L", help=latencies)
    return parser


def main() -> None:
    options.main(work, make_parser(), beside=(".md", ".png", ".logs"))


if __name__ == "__main__":
    main()
