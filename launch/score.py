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


def work(args: argparse.Namespace) -> dict[str, Any]:
    config = cli.run_config(args)
    from ds_ring import results, runtime, score

    documents = score.read_documents(config)
    config = runtime.resolve(config)
    engine = runtime.from_pretrained(config=config)
    found = score.score(engine, documents, show_progress=cli.is_first_rank())
    return {**results.provenance(), "config": config.document(), **found}


if __name__ == "__main__":
    cli.main(work, cli.run_parser(__doc__))
