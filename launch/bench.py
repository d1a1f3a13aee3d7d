"""Measure one layout on one workload.

    deepspeed --num_gpus 4 launch/bench.py --config ds_configs/gpu4/ring4.json

Prints throughput (TPS), TPOT, MFU, memory, bytes sent and exposed communication: definitions in ds_ring/metrics.py
and ds_ring/bench.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_ring import cli
from ds_ring.errors import ConfigError


def work(args: argparse.Namespace) -> dict[str, Any]:
    config = cli.run_config(args)
    from ds_ring import bench, results, runtime

    config = runtime.resolve(config)
    bench.check(config)
    cli.say(f"{config.label}: load {config.ring.model}")
    engine = runtime.from_pretrained(config=config)
    lengths = config.workload.lengths
    if len(args.references) > len(lengths):
        raise ConfigError(f"{len(args.references)} references for {len(lengths)} lengths; give at most one a length")
    references = dict(zip(lengths, args.references, strict=False))
    rows: list[dict[str, Any]] = []
    document = {**results.provenance(), "config": config.document(), "rows": rows}
    for row in bench.measure(engine, references, cli.say, Path(args.trace) if args.trace else None):
        rows.append(row)
        if args.output and cli.is_first_rank():  # after every row: a longer one may not fit
            results.write_json(args.output, document)
    return document


if __name__ == "__main__":
    parser = cli.run_parser(__doc__)
    references = "files of ds_ring.parity for the shortest lengths, ascending"
    parser.add_argument("--references", nargs="+", default=[], metavar="FILE", help=references)
    parser.add_argument("--trace", metavar="FILE.json", help="leave a Chrome trace of one pass of every rank here")
    cli.main(work, parser)
