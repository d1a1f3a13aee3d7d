"""Which of transformers' causal LMs work in a layout: each in small with random weights, sharded against unsharded.

    deepspeed --num_gpus 4 launch/check_models.py --ulysses-degree 2 --ring-degree 2 --markdown models.md

Logits and 64 greedy tokens are compared; those that cannot work are listed with the error they give.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_ring import cli


def work(args: argparse.Namespace) -> dict[str, Any]:
    from ds_ring.config import RunConfig

    config = RunConfig.load(args.config, **{**cli.overrides(args), "dtype": "fp32"})
    from ds_ring import check_models, results

    found = check_models.check(config, args.types, cli.say)
    document = {**results.provenance(), "config": config.document(), **found}
    if args.markdown and cli.is_first_rank():
        results.write_atomically(args.markdown, check_models.markdown(document))
    return document


if __name__ == "__main__":
    parser = cli.run_parser(__doc__)
    parser.add_argument("--types", nargs="+", default=[], metavar="TYPE", help="model types [all of transformers']")
    parser.add_argument("--markdown", metavar="FILE.md", help="where to write the table")
    cli.main(work, parser)
