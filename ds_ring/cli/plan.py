"""Which layout to take: every one that a model, a batch and a number of GPUs allow, with its predicted step and memory.

    ds-ring plan checkpoints/paper --ranks 16 --card H100 --batch-size 1024 --max-length 10000

Needs no GPU and no weights: --model may be a config file of ds_configs/models/. Predictions order layouts;
launch/compare.py measures them.
"""

from __future__ import annotations

import argparse
from typing import Any

from ds_ring.cli import options
from ds_ring.cli.parser import MOST_RANKS, Parser, whole
from ds_ring.planning.cards import CARDS


def work(args: argparse.Namespace) -> dict[str, Any]:
    from ds_ring.cli.plan_table import plan_table
    from ds_ring.hf.dims import model_dims, read_config
    from ds_ring.hf.flops import linear_parameters
    from ds_ring.planning import plan
    from ds_ring.utils import progress, results

    run = options.run_config(args)
    config = read_config(run.checkpoint)
    card, weights = CARDS[args.card], linear_parameters(config)
    plans = plan.plans(run, model_dims(config), weights, args.ranks, card)
    rows = [plan.row(each) for each in plans]
    progress.make_console().print(plan_table(rows))
    best, reason = plan.best_of(plans, args.ranks, card)
    options.say(reason)
    return {**results.provenance(), "chosen": best.config.document(), "reason": reason, "rows": rows}


def make_parser() -> Parser:
    parser = options.run_parser(__doc__)
    parser.add_argument("--ranks", type=whole(1, MOST_RANKS), required=True, metavar="N", help="GPUs, over all hosts")
    parser.add_argument("--card", choices=sorted(CARDS), default="H100", help="which GPU [H100]")
    return parser


def main() -> None:
    options.main(work, make_parser())


if __name__ == "__main__":
    main()
