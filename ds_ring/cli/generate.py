"""Generate text from prompts, with the key/value cache spread over the ranks.

    ds-ring generate DIR --prompt "What is the capital of France?"
    deepspeed --num_gpus 4 launch/generate.py --model DIR --prompt-file book.txt --max-new-tokens 200

Prompts go through the tokenizer's chat template where it has one; --raw takes them as they are. Without degrees the
layout is planned for the prompts and the ranks that were started. Standard error shows how far the prompts are, and the
text of a single prompt as it is generated. The last line of standard output is one JSON document: ttft_ms,
decode_tpot_ms, tokens_per_second, cache_gib_per_rank and the completions.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from ds_ring.cli import inputs, options, sampling
from ds_ring.cli.parser import LARGEST_SEED, Parser, number, temperature, whole
from ds_ring.config import RunConfig
from ds_ring.errors import InputError

DEGREES = {"auto", "dp_size", "pp_size", "ring_degree", "ulysses_degree"}


def check(args: argparse.Namespace, ranks: int | None = None) -> None:
    """Raise UserError for options that cannot work, as far as that shows without the model."""
    check_prompts(args)
    inputs.check_read_once(args.prompt_file, ranks)
    config = planned_by_default(options.run_config(args), ranks)
    inputs.check_degrees(config, ranks)
    inputs.check_checkpoint(config)


def check_prompts(args: argparse.Namespace) -> None:
    """Raise InputError for prompts and sampling that no model could follow."""
    sampling.check(_sampling(args))
    if not [*args.prompt, *args.prompt_file]:
        raise InputError("no prompt: give --prompt TEXT… or --prompt-file FILE…")
    for place, text in enumerate(args.prompt, 1):
        if not text.strip():
            raise InputError(f"prompt {place} of {len(args.prompt) + len(args.prompt_file)} is empty")
    inputs.check_texts(args.prompt_file)


def _sampling(args: argparse.Namespace) -> sampling.Sampling:
    return sampling.Sampling(args.temperature, args.top_p, args.top_k, args.seed)


def work(args: argparse.Namespace) -> dict[str, Any]:
    config = planned_by_default(options.run_config(args))
    from ds_ring import api
    from ds_ring.cli import prompts
    from ds_ring.cli.timed_generation import check_room, check_settings, generate, summary
    from ds_ring.utils import results

    tokenizer, token_ids = prompts.read(config, args.prompt, args.prompt_file, args.max_new_tokens, raw=args.raw)
    check_settings(config, tokenizer, token_ids, args.max_new_tokens, _sampling(args), options.say)
    config = api.with_planned_degrees(prompts.sized(config, token_ids, args.max_new_tokens), generating=True)
    check_room(config, token_ids, args.max_new_tokens)
    engine = api.from_pretrained(config=config)
    found = generate(
        engine, tokenizer, token_ids, max_new_tokens=args.max_new_tokens, sampling=_sampling(args), say=options.say,
        stream=True,
    )  # fmt: skip
    options.say(summary(found))
    return {**results.provenance(), "config": config.document(), **found}


def planned_by_default(config: RunConfig, ranks: int | None = None) -> RunConfig:
    """``config``, with its degrees left to the planner where it gives none and several ranks are launched: ``ranks``,
    or this launch's."""
    given = config.tp_size > 1 or DEGREES & config.parallel.model_fields_set
    one = (ranks or int(os.environ.get("WORLD_SIZE", "1"))) == 1
    return config if given or one else RunConfig.load(config, auto=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of prompts and sampling."""
    parser.add_argument("--prompt", nargs="+", default=[], metavar="TEXT")
    parser.add_argument("--prompt-file", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--raw", action="store_true", help="do not apply the tokenizer's chat template")
    parser.add_argument("--max-new-tokens", type=whole(1), default=64, metavar="N", help="tokens a prompt [64]")
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, help="of sampling; 0 takes the likeliest token [0]"
    )
    top_p, top_k = "sample among the likeliest of this mass", "sample among the N likeliest; 0: all"
    parser.add_argument("--top-p", type=number(0, 1, above=True), default=1.0, help=f"with a temperature: {top_p} [1]")
    parser.add_argument("--top-k", type=whole(0), default=0, metavar="N", help=f"with a temperature: {top_k} [0]")
    seed = whole(0, LARGEST_SEED)
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="with a temperature: of sampling [0]")


def make_parser() -> Parser:
    parser = options.run_parser(__doc__, options.USUAL)
    add_options(parser)
    return parser


def main() -> None:
    options.main(work, make_parser(), check)


if __name__ == "__main__":
    main()
