"""Generate text from prompts, with the key/value cache spread over the ranks.

    deepspeed --num_gpus 4 launch/generate.py --model DIR --ring-degree 4 --prompt-file book.txt --max-new-tokens 200

With --prefill-chunk standard error tells how far the prompts are, at most once a second. A single prompt's text appears
there as it is made, and a summary at the end. The last line of standard output is one JSON document: ttft_ms,
decode_tpot_ms, tokens_per_second, cache_gib_per_rank and the completions. With --passes 1000 its held_gib_after_pass
shows whether generations leave memory behind.

With --auto the layout is planned for the prompts and their new tokens, but for a --batch-size or --max-length that is
given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_ring.cli import options


def work(args: argparse.Namespace) -> dict[str, Any]:
    config = options.run_config(args)
    from ds_ring import api
    from ds_ring.cli import generate
    from ds_ring.utils import results

    sampling = generate.Sampling(args.temperature, args.top_p, args.top_k, args.seed)
    generate.check(args.max_new_tokens, sampling, args.passes)
    tokenizer, prompts = generate.read_prompts(config, args.prompt, args.prompt_file)
    generate.check_lengths(config, prompts, args.max_new_tokens)
    config = api.with_planned_degrees(generate.sized(config, prompts, args.max_new_tokens))
    engine = api.from_pretrained(config=config)
    looked_at, held = generate.passes_to_look_at(args.passes), {}
    for number in range(1, args.passes + 1):
        found = generate.run(
            engine, tokenizer, prompts, max_new_tokens=args.max_new_tokens, sampling=sampling,
            say=options.say if number in looked_at else lambda text: None, stream=number == args.passes,
        )  # fmt: skip
        if number in looked_at:
            held[str(number)] = generate.held_gib(engine)
    options.say(generate.summary(found))
    memory = {"passes": args.passes, "held_gib_after_pass": held, "held_growth": generate.growth(held)}
    return {**results.provenance(), "config": config.document(), **memory, **found}


if __name__ == "__main__":
    parser = options.run_parser(__doc__)
    parser.add_argument("--prompt", nargs="+", default=[], metavar="TEXT")
    parser.add_argument("--prompt-file", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens a prompt [64]")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 takes the likeliest token [0]")
    top_p, top_k = "sample among the likeliest of this mass", "sample among the N likeliest; 0: all"
    parser.add_argument("--top-p", type=float, default=1.0, help=f"with a temperature: {top_p} [1]")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help=f"with a temperature: {top_k} [0]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="with a temperature: of sampling [0]")
    passes = "how often to generate; the last pass counts, so that 2 leaves out what first calls cost [1]"
    parser.add_argument("--passes", type=int, default=1, metavar="N", help=passes)
    options.main(work, parser)
