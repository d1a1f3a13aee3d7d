"""Which layout to take: every one that a model, a batch and a number of GPUs allow, with its predicted step and memory.

    ds-ring plan checkpoints/paper --ranks 16 --card H100 --batch-size 1024 --max-length 10000
    ds-ring plan checkpoints/paper --ranks 16 --gpus-per-host 16       one NVLink domain of 16

Needs no GPU and no weights: --model may be a config file of ds_configs/models/. Predictions order layouts;
launch/compare.py measures them. Each step is shown as the sum that gives it; what no record has is listed as assumed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from ds_ring.cli import options
from ds_ring.cli.parser import Parser, number, whole
from ds_ring.planning.cards import CARDS, Card
from ds_ring.planning.limits import MOST_RANKS, check_size


def work(args: argparse.Namespace) -> dict[str, Any]:
    run, card = options.run_config(args), card_of(args)
    check_size(run, args.ranks)  # before the imports, which take seconds
    from ds_ring.cli.plan_table import plan_table
    from ds_ring.hf.dims import model_dims
    from ds_ring.hf.flops import linear_parameters
    from ds_ring.planning import explain, plan
    from ds_ring.utils import progress, results
    from ds_ring.utils.model_config import read_config

    config = read_config(run.checkpoint)
    dims, weights = model_dims(config), linear_parameters(config)
    plans = plan.plans(run, dims, weights, args.ranks, card)
    rows = [explain.row(each, plans, dims, card) for each in plans]
    best, reason = plan.best_of(plans, args.ranks, card)
    console = progress.make_console()
    console.print(plan_table(rows))
    for row in rows:
        if row["fits"]:
            said = [f"{row['layout']} ({row['placement']}): {row['sum']}"]
            said += [f"    transfers alone: {row['transfers_alone']}"] * bool(row["transfers_alone"])
            said += [f"    {row['why_slower']}"] * bool(row["why_slower"])
            console.print("\n".join(said), highlight=False, markup=False, soft_wrap=True)
    assumed = explain.used(rows)
    for text in assumed:
        options.say(f"assumed: {text}")
    options.say(reason)
    return {
        **results.provenance(), "chosen": best.config.document(), "reason": reason, "assumed": assumed, "rows": rows,
    }  # fmt: skip


def card_of(args: argparse.Namespace) -> Card:
    """The card of ``--card`` on hosts as the options describe them."""
    card = CARDS[args.card]
    per_host = args.gpus_per_host or card.per_host
    adapters = args.adapters_per_host or per_host
    gbps = args.network_gbps or 8e-9 * card.network_bytes
    return replace(card, per_host=per_host, adapters=adapters / per_host, network_bytes=gbps * 1e9 / 8)


def make_parser() -> Parser:
    parser = options.run_parser(__doc__)
    parser.add_argument("--ranks", type=whole(1, MOST_RANKS), required=True, metavar="N", help="GPUs, over all hosts")
    parser.add_argument("--card", choices=sorted(CARDS), default="H100", help="which GPU [H100]")
    parser.add_argument(
        "--gpus-per-host", type=whole(1), metavar="N", help="GPUs that NVLink connects: of a host, or of one domain [8]"
    )
    parser.add_argument(
        "--network-gbps",
        type=number(0, above=True),
        metavar="G",
        help="Gbit/s one way of a GPU's adapter between hosts [400, assumed]",
    )
    parser.add_argument(
        "--adapters-per-host", type=whole(1), metavar="N", help="adapters of a host, which its GPUs share [one a GPU]"
    )
    return parser


def main() -> None:
    options.main(work, make_parser())


if __name__ == "__main__":
    main()
