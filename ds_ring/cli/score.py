"""Score documents: token log-likelihood and perplexity of each, in any layout.

ds-ring score DIR a.txt b.txt
deepspeed --num_gpus 3 launch/score.py --model DIR --ring-degree 3 --text a.txt b.txt
"""

from __future__ import annotations

import argparse
from typing import Any

from ds_ring.cli import inputs, options
from ds_ring.cli.generate import planned_by_default
from ds_ring.cli.parser import Parser
from ds_ring.errors import InputError


def check(args: argparse.Namespace, ranks: int | None = None) -> None:
    """Raise UserError for options that cannot work, as far as that shows without the model."""
    if not args.documents:
        raise InputError("no documents: give --text FILE…")
    inputs.check_texts(args.documents)
    config = planned_by_default(options.run_config(args), ranks)
    inputs.check_degrees(config, ranks)
    inputs.check_checkpoint(config)


def work(args: argparse.Namespace) -> dict[str, Any]:
    config = planned_by_default(options.run_config(args))
    from ds_ring import api
    from ds_ring.cli import documents
    from ds_ring.utils import results

    texts = documents.read(config, args.documents, special_tokens=not args.no_special_tokens)
    config = api.with_planned_degrees(documents.sized(config, texts))
    engine = api.from_pretrained(config=config)
    scores = documents.score(engine, texts, show_progress=options.is_first_rank())
    return {**results.provenance(), "config": config.document(), **scores}


def make_parser() -> Parser:
    parser = options.run_parser(__doc__, (*options.USUAL, "max_length"))
    text = "documents, UTF-8 text"
    parser.add_argument("--text", nargs="+", action="extend", dest="documents", default=[], metavar="FILE", help=text)
    without = "leave out the special tokens that the tokenizer adds, such as one that begins every text"
    parser.add_argument("--no-special-tokens", action="store_true", help=without)
    return parser


def main() -> None:
    options.main(work, make_parser(), check)


if __name__ == "__main__":
    main()
