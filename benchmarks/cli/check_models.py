"""Which of transformers' causal LMs work in a layout: each in small with random weights, sharded against unsharded.

    deepspeed --num_gpus 4 launch/check_models.py --ulysses-degree 2 --ring-degree 2 --output results/models_hybrid.json
    python launch/check_models.py --table results/models_*.json --markdown models.md

Logits and greedy tokens are compared; those that cannot work are listed with the error they give.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ds_ring.cli import options
from ds_ring.cli.parser import Parser, whole
from ds_ring.errors import InputError


def work(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.models import models_page
    from ds_ring.utils import output_file, results

    if args.table:
        if missing := [file for file in args.table if not Path(file).is_file()]:
            raise InputError(f"no such file: {', '.join(missing)}")
        documents = [results.read_json(file) for file in args.table]
        output_file.write_atomically(args.markdown, models_page.text(documents))
        return {"page": args.markdown, "layouts": [document["layout"] for document in documents]}
    from ds_ring.config import RunConfig

    config = RunConfig.load(args.config, **{**options.overrides(args), "dtype": "fp32"})
    from benchmarks.models import check_models, trials

    check_models.check_names(args.types, args.new_tokens)
    general = {"layout": config.topology.label(), "length": trials.LENGTH, "new_tokens": args.new_tokens}
    document = {**results.provenance(), "config": config.document(), **general}
    rows = check_models.rows(config, args.types, args.new_tokens, options.say)
    return results.collect(document, rows, args.output if options.is_first_rank() else None)


def make_parser() -> Parser:
    parser = options.run_parser(__doc__)
    parser.add_argument("--types", nargs="+", default=[], metavar="TYPE", help="model types [all of transformers']")
    parser.add_argument("--new-tokens", type=whole(1), default=64, metavar="N", help="greedy tokens to compare [64]")
    table = "check nothing: make a table of these results, one layout each"
    parser.add_argument("--table", nargs="+", default=[], metavar="FILE.json", help=table)
    markdown = "where to write the table [models.md]"
    parser.add_argument("--markdown", default="models.md", metavar="FILE.md", help=markdown)
    return parser


def main() -> None:
    options.main(work, make_parser())


if __name__ == "__main__":
    main()
