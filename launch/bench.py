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


def work(args: argparse.Namespace) -> dict[str, Any]:
    config = cli.run_config(args)
    from ds_ring import bench, results, runtime

    config = runtime.resolve(config)
    bench.check(config)
    cli.say(f"{config.topology.label()}: load {config.ring.model}")
    engine = runtime.from_pretrained(config=config)
    references = dict(zip(config.workload.lengths, args.references or (), strict=bool(args.references)))
    rows = bench.measure(engine, references, cli.say, Path(args.trace) if args.trace else None)
    return {**results.provenance(), "config": config.document(), "rows": rows}


if __name__ == "__main__":
    parser = cli.run_parser(__doc__)
    parser.add_argument("--references", nargs="+", metavar="FILE", help="a file of ds_ring.parity for each length")
    parser.add_argument("--trace", metavar="FILE.json", help="leave a Chrome trace of one pass of every rank here")
    cli.main(work, parser)
