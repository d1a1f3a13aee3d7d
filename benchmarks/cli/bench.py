"""Measure one layout on one workload.

    deepspeed --num_gpus 4 launch/bench.py --config ds_configs/gpu4/ring4.json

Prints throughput (TPS), TPOT, MFU, memory, bytes sent and exposed communication: definitions in
ds_ring/planning/metrics.py and benchmarks/layouts/bench.py.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ds_ring.cli import inputs, options
from ds_ring.cli.parser import Parser
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, InputError


def check(args: argparse.Namespace, ranks: int | None = None) -> None:
    """Raise UserError for options that cannot work, as far as that shows without the model."""
    for config in [options.run_config(args), *(RunConfig.load(file) for file, _ in args.then)]:
        options.check_outputs(args, config)
        if len(args.references) > len(config.lengths):
            raise ConfigError(
                f"{len(args.references)} references for {len(config.lengths)} lengths; give at most one a length"
            )
        inputs.check_texts(config.benchmark.text)
        inputs.check_read_once(config.benchmark.text, ranks)
        inputs.check_degrees(config, ranks)
        inputs.check_checkpoint(config)
    if missing := [file for file in args.references if not os.path.isfile(file)]:
        raise InputError(f"cannot read {missing[0]}: no such file")


def work(args: argparse.Namespace) -> dict[str, Any]:
    first = measure(options.run_config(args), args.references, args.output, args.trace)
    from ds_ring.utils.device import release_memory
    from ds_ring.utils.results import write_complete

    for config, output in args.then:
        release_memory()
        document = measure(RunConfig.load(config), args.references, output, None)
        if options.is_first_rank():
            write_complete(output, document)  # that of --output is written where it is printed
    return first


def measure(config: RunConfig, references: list[str], output: str | None, trace: str | None) -> dict[str, Any]:
    from benchmarks.baselines import load
    from benchmarks.layouts import bench
    from ds_ring import api
    from ds_ring.utils import results

    config = api.with_planned_degrees(config)
    bench.check(config)
    options.say(f"{config.label}: load {config.ring.model}")
    engine = load.from_pretrained(config)
    lengths = config.lengths
    by_length = dict(zip(lengths, references, strict=False))
    rows = bench.measure(engine, by_length, options.say, Path(trace) if trace else None)
    document = {**results.provenance(), "config": config.document()}
    return results.collect(document, rows, output if options.is_first_rank() else None)


def make_parser() -> Parser:
    parser = options.run_parser(__doc__)
    references = "files of benchmarks.layouts.parity for the shortest lengths, ascending"
    parser.add_argument("--references", nargs="+", default=[], metavar="FILE", help=references)
    others = "after the first, measure this file's layout in the same processes; it must have as many ranks"
    parser.add_argument("--then", nargs=2, action="append", default=[], metavar=("CONFIG", "OUTPUT"), help=others)
    parser.add_argument("--trace", metavar="FILE.json", help="leave a Chrome trace of one pass of every rank here")
    return parser


def main() -> None:
    options.main(work, make_parser(), check)


if __name__ == "__main__":
    main()
