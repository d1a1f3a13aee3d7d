"""Score documents: token log-likelihood and perplexity of each, in any layout.

deepspeed --num_gpus 3 launch/score.py --model checkpoints/small --ring-degree 3 --max-length 100000 --text a.txt b.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_ring import cli
from ds_ring.errors import InputError


def work(args: argparse.Namespace) -> dict[str, Any]:
    config = cli.run_config(args)
    if not config.workload.text:
        raise InputError("no documents: give --text FILE…")
    # Documents come in groups of one micro-batch a replica, however many there are.
    config = config.load(config, batch_size=config.parallel.dp_size * config.workload.micro_batch_size)
    from ds_ring import results, runtime, score

    engine = runtime.from_pretrained(config=config)
    found = score.score(engine, list(config.workload.text), show_progress=cli.is_first_rank())
    return {**results.provenance(), "config": config.document(), **found}


if __name__ == "__main__":
    cli.main(work, cli.run_parser(__doc__))
