"""Generate text from prompts, with the key/value cache spread over the ranks.

    deepspeed --num_gpus 4 launch/generate.py --model DIR --ring-degree 4 --prompt-file book.txt --max-new-tokens 200

With --prefill-chunk, standard error shows how many prompt tokens are done, at most once a second. The text of a single
prompt appears there as it is generated, and a summary at the end. The last line of standard output is one JSON
document: ttft_ms, decode_tpot_ms, tokens_per_second, cache_gib_per_rank and the completions. With --passes 1000 its
held_gib_after_pass shows whether generations leak memory.

With --auto the layout is planned for the prompts and their new tokens, unless --batch-size or --max-length is given.
"""

from __future__ import annotations

import argparse
from typing import Any

from ds_ring.cli import options


def work(args: argparse.Namespace) -> dict[str, Any]:
    config = options.run_config(args)
    from ds_ring import api
    from ds_ring.cli import held_memory, prompts
    from ds_ring.cli.sampling import Sampling, check
    from ds_ring.cli.timed_generation import generate, summary
    from ds_ring.utils import results

    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.seed)
    check(args.max_new_tokens, sampling, args.passes)
    tokenizer, token_ids = prompts.read(config, args.prompt, args.prompt_file)
    prompts.check_lengths(config, token_ids, args.max_new_tokens)
    config = api.with_planned_degrees(prompts.sized(config, token_ids, args.max_new_tokens))
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
    memory = {
        "passes": args.passes, "held_gib_after_pass": held_gib, "held_growth": held_memory.growth(held_gib),
    }  # fmt: skip
    return {**results.provenance(), "config": config.document(), **memory, **found}


def main() -> None:
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
