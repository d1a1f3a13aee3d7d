"""Time generation: several passes, the least time that a step could take, and whether passes leave memory behind.

    deepspeed --num_gpus 2 launch/bench_generate.py --model DIR --ring-degree 2 --prompt-file long.txt --passes 2

The last pass counts, so that two leave out what first calls cost. Beside what launch/generate.py gives there are
decode_floor_ms and decode_over_floor (benchmarks/layouts/decode_floor.py), and held_gib_after_pass, which shows with
--passes 1000 whether generations leak memory. Prompts are taken as they are, without a chat template.
"""

from __future__ import annotations

import argparse
from typing import Any

from ds_ring.cli import inputs, options
from ds_ring.cli.generate import add_options, check_prompts
from ds_ring.cli.parser import Parser, whole


def check(args: argparse.Namespace, ranks: int | None = None) -> None:
    """Raise UserError for options that cannot work, as far as that shows without the model."""
    check_prompts(args)
    inputs.check_read_once(args.prompt_file, ranks)
    config = options.run_config(args)
    inputs.check_degrees(config, ranks)
    inputs.check_checkpoint(config)


def work(args: argparse.Namespace) -> dict[str, Any]:
    config = options.run_config(args)
    from benchmarks.layouts import held_memory
    from benchmarks.layouts.decode_floor import floor
    from ds_ring import api
    from ds_ring.cli import prompts
    from ds_ring.cli.sampling import Sampling
    from ds_ring.cli.timed_generation import check_settings, generate, summary
    from ds_ring.utils import results

    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.seed)
    tokenizer, token_ids = prompts.read(config, args.prompt, args.prompt_file, args.max_new_tokens, raw=True)
    check_settings(config, tokenizer, token_ids, args.max_new_tokens, sampling, options.say)
    config = api.with_planned_degrees(prompts.sized(config, token_ids, args.max_new_tokens), generating=True)
    engine = api.from_pretrained(config=config)
    recorded, held_gib = held_memory.recorded_passes(args.passes), {}
    for number in range(1, args.passes + 1):
        found = generate(
            engine, tokenizer, token_ids, max_new_tokens=args.max_new_tokens, sampling=sampling,
            say=options.say if number in recorded else lambda text: None, stream=number == args.passes,
        )  # fmt: skip
        if number in recorded:
            held_gib[str(number)] = held_memory.most_held_gib(engine)
    options.say(summary(found))
    memory = {"passes": args.passes, "held_gib_after_pass": held_gib, "held_growth": held_memory.growth(held_gib)}
    return {**results.provenance(), "config": config.document(), **memory, **found, **floor(engine, found)}


def make_parser() -> Parser:
    parser = options.run_parser(__doc__)
    add_options(parser)
    passes = "how often to generate; the last pass counts [1]"
    parser.add_argument("--passes", type=whole(1), default=1, metavar="N", help=passes)
    return parser


def main() -> None:
    options.main(work, make_parser(), check)


if __name__ == "__main__":
    main()
