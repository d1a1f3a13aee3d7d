"""A trained checkpoint in a layout beside unsharded transformers: perplexity of real text, and greedy answers.

    deepspeed --quiet --num_gpus 2 launch/check_checkpoint.py --model DIR --dtype fp16 --ring-degree 2 --max-length 8192

The text is the Python language reference, or the files of --text; the questions go through the chat template. The last
line of standard output has both perplexities and how many tokens of the answers are equal.
"""

from __future__ import annotations

import argparse
from typing import Any

from ds_ring.cli import options
from ds_ring.cli.parser import Parser, whole


def work(args: argparse.Namespace) -> dict[str, Any]:
    config = options.run_config(args)
    from benchmarks.models import real_checkpoint
    from ds_ring.utils import results

    found = real_checkpoint.check(config, args.max_new_tokens, options.say)
    return {**results.provenance(), "config": config.document(), **found}


def make_parser() -> Parser:
    parser = options.run_parser(__doc__)
    parser.add_argument("--max-new-tokens", type=whole(1), default=128, metavar="N", help="tokens an answer [128]")
    return parser


def main() -> None:
    options.main(work, make_parser())


if __name__ == "__main__":
    main()
