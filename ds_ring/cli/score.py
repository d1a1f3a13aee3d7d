"""Score documents: log-likelihood and perplexity of each, in any layout.

    ds-ring score DIR a.txt b.txt
    ds-ring score DIR --documents in.jsonl --scores out.jsonl
    deepspeed --num_gpus 3 launch/score.py --model DIR --ring-degree 3 --text a.txt b.txt

--documents has one JSON object a line: {"id", "text"}, {"id", "input_ids", "target_ids"} or {"id", "messages"}, whose
assistant's tokens are scored. --scores gets a line for each as it finishes, in the documents' order at the end. Where a
run was cut the same command with --resume goes on, and gives the same file.
"""

from __future__ import annotations

import argparse
from typing import Any

from ds_ring.cli import document_lines, inputs, options, scores_file
from ds_ring.cli.generate import planned_by_default
from ds_ring.cli.parser import Parser, whole
from ds_ring.config import RunConfig
from ds_ring.errors import InputError

NAMED = 20
"""Documents too long that are named on standard error; --scores says it of all."""


def check(args: argparse.Namespace, ranks: int | None = None) -> None:
    """Raise UserError for options that cannot work, as far as that shows without the model."""
    if args.documents is None:
        for option in ("scores", "resume", "per_token", "top_k", "entropy"):
            if getattr(args, option):
                raise InputError(f"--{option.replace('_', '-')} goes with --documents FILE.jsonl")
        if not args.text:
            raise InputError("no documents: give --text FILE… or --documents FILE.jsonl")
        inputs.check_texts(args.text)
        inputs.check_read_once(args.text, ranks)
    else:
        if args.text:
            raise InputError("--text and --documents exclude each other; give texts as lines of --documents")
        if args.scores is None:
            raise InputError("--documents needs --scores FILE.jsonl, which gets a line for each")
        if options.is_first_rank():  # which alone writes; on other hosts there may be nothing
            scores_file.check_free(args.scores, args.resume)
        document_lines.read_lines(args.documents)
    config = planned_by_default(options.run_config(args), ranks)
    inputs.check_degrees(config, ranks)
    inputs.check_checkpoint(config)


def work(args: argparse.Namespace) -> dict[str, Any]:
    config = planned_by_default(options.run_config(args))
    from ds_ring.utils import results

    found = _of_files(config, args) if args.documents is None else _of_lines(config, args)
    return {**results.provenance(), **found}


def _of_files(config: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    from ds_ring import api
    from ds_ring.cli import documents, scoring_job

    texts = documents.read_files(config, args.text, special_tokens=not args.no_special_tokens)
    config = api.with_planned_degrees(documents.sized(config, texts))
    engine = api.from_pretrained(config=config)
    return {"config": config.document(), **scoring_job.of_files(engine, texts, options.say)}


def _of_lines(config: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    from ds_ring import api
    from ds_ring.cli import documents, scoring_job

    texts = documents.read_json_lines(config, args.documents, special_tokens=not args.no_special_tokens)
    _say_too_long(texts)
    config = api.with_planned_degrees(documents.sized(config, texts))
    lists = scoring_job.Lists(args.per_token, args.top_k, args.entropy)
    job, ids = scoring_job.job_of(config, texts, lists), [text.id for text in texts]
    file = scores_file.ScoresFile(args.scores, job, ids, args.resume) if options.is_first_rank() else None
    engine = api.from_pretrained(config=config)
    totals = scoring_job.into_file(engine, texts, lists, file, job, options.say)
    return {"config": config.document(), "layout": config.label, "scores": args.scores, **totals}


def _say_too_long(texts: list[Any]) -> None:
    long = [text for text in texts if text.too_long is not None]
    for text in long[:NAMED]:
        options.say(f"document {text.id} is left out: {text.too_long}")
    if len(long) > NAMED:
        options.say(f"{len(long) - NAMED:,} more documents are left out, as their lines of --scores say")


def make_parser() -> Parser:
    parser = options.run_parser(__doc__, (*options.USUAL, "max_length"))
    parser.add_argument("--text", nargs="+", action="extend", default=[], metavar="FILE", help="documents, UTF-8 text")
    parser.add_argument("--documents", metavar="FILE.jsonl", help="documents as JSON Lines")
    parser.add_argument("--scores", metavar="FILE.jsonl", help="with --documents: where their lines go")
    parser.add_argument("--resume", action="store_true", help="go on with a --scores file of a run that was cut")
    lists = parser.add_argument_group("lists in each line of --scores, with a value for each scored token")
    lists.add_argument("--per-token", action="store_true", help="log-probability, rank and is_argmax of each target")
    lists.add_argument("--top-k", type=whole(0), default=0, metavar="N", help="the N likeliest tokens [0]")
    lists.add_argument("--entropy", action="store_true", help="the entropy, in nats")
    without = "leave out the special tokens that the tokenizer adds, such as one that begins every text"
    parser.add_argument("--no-special-tokens", action="store_true", help=without)
    return parser


def main() -> None:
    options.main(work, make_parser(), check)


if __name__ == "__main__":
    main()
