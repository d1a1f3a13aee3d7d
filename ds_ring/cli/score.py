"""Score documents: token log-likelihood and perplexity of each, in any layout.

deepspeed --num_gpus 3 launch/score.py --model checkpoints/small --ring-degree 3 --max-length 100000 --text a.txt b.txt
"""

from __future__ import annotations

import argparse
from typing import Any

from ds_ring.cli import options


def work(args: argparse.Namespace) -> dict[str, Any]:
    config = options.run_config(args)
    from ds_ring import api
    from ds_ring.cli import documents
    from ds_ring.utils import results

    texts = documents.read(config)
    config = api.with_planned_degrees(config)
    engine = api.from_pretrained(config=config)
    scores = documents.score(engine, texts, show_progress=options.is_first_rank())
    return {**results.provenance(), "config": config.document(), **scores}


def main() -> None:
    options.main(work, options.run_parser(__doc__))
