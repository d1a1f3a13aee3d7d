"""Write tasks for lm_eval that ask for what stands far back in a long text, in the manner of RULER.

    ds-ring make-tasks DIR --directory tasks --lengths 4096 32768
    ds-ring evaluate DIR -- --include_path tasks --tasks needle_4096,variables_4096

The text is the Python language reference, which comes with every interpreter: nothing is downloaded. In needle_N one of
several numbers is asked for by its key; in variables_N the value of the last of a chain of variables, each assigned
from the one before, beside a second chain. N is the prompt and its answer in tokens of the model's tokenizer.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ds_ring.cli import options
from ds_ring.cli.parser import LARGEST_SEED, Parser, whole
from ds_ring.errors import ConfigError, OutputError
from ds_ring.utils import strict_json

LEAST_LENGTH, ANSWER_TOKENS = 512, 32
KEYS = ("amber", "basalt", "cedar", "delta", "ember", "falcon", "garnet", "harbor")
CHAIN = 4
"""Variables of a chain."""

Made = tuple[list[str], str, str]
"""(sentences that are hidden in the text, in this order; the question; its answer)"""


def needle(chance: random.Random) -> Made:
    """A number for each of four keys, one of which is asked for."""
    keys = chance.sample(KEYS, 4)
    numbers = [str(number) for number in chance.sample(range(1_000_000, 10_000_000), len(keys))]
    hidden = [f"The special number of {key} is {number}." for key, number in zip(keys, numbers, strict=True)]
    chance.shuffle(hidden)
    return hidden, f"What is the special number of {keys[0]}? The special number of {keys[0]} is", numbers[0]


def variables(chance: random.Random) -> Made:
    """Two chains of assignments, mixed; the last variable of one of them is asked for."""
    letters = chance.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 2 * CHAIN)
    values = [str(number) for number in chance.sample(range(10_000, 100_000), 2)]
    hidden, chains = list[str](), [letters[:CHAIN], letters[CHAIN:]]
    steps = chance.sample([0] * CHAIN + [1] * CHAIN, 2 * CHAIN)
    done = [0, 0]
    for chain in steps:
        place = done[chain]
        value = values[chain] if place == 0 else f"VAR_{chains[chain][place - 1]}"
        hidden.append(f"VAR_{chains[chain][place]} = {value}.")
        done[chain] += 1
    return hidden, f"What number is VAR_{chains[0][-1]}? VAR_{chains[0][-1]} =", values[0]


KINDS: dict[str, Callable[[random.Random], Made]] = {"needle": needle, "variables": variables}


def prompt(chance: random.Random, made: Made, sentences: Sequence[str], count: Callable[[str], int], room: int) -> str:
    """The text with what is hidden at random places, and the question: at most ``room`` tokens by ``count``."""
    hidden, question, _ = made
    start, left = chance.randrange(len(sentences)), room - count("\n\n" + question) - sum(map(count, hidden))
    text = list[str]()
    while (tokens := count(sentence := sentences[(start + len(text)) % len(sentences)])) <= left:
        text.append(sentence)
        left -= tokens
    places = sorted(chance.randrange(len(text) + 1) for _ in hidden)
    for place, sentence in reversed(list(zip(places, hidden, strict=True))):
        text.insert(place, sentence)
    return " ".join(text) + "\n\n" + question


def task(name: str, file: Path) -> dict[str, Any]:
    """lm_eval's description of a task: the first number that is generated must be the answer."""
    number = [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}]
    return {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test", "output_type": "generate_until",
        "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": ANSWER_TOKENS, "do_sample": False},
        "filter_list": [{"name": "number", "filter": number}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for a directory that cannot be made."""
    try:
        os.makedirs(args.directory, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--directory {args.directory} cannot be made: {error.strerror}") from None


def work(args: argparse.Namespace) -> dict[str, Any]:
    from ds_ring.hf.checkpoint import Checkpoint
    from ds_ring.utils.corpus import default_text, load_tokenizer

    Checkpoint.open(args.model)
    tokenizer = load_tokenizer(args.model)
    sentences = [" ".join(part.split()) for part in default_text().split("\n\n")]
    sentences = [sentence for sentence in sentences if 40 < len(sentence) < 600]
    known = dict[str, int]()

    def count(text: str) -> int:
        if text not in known:  # one more for the space between sentences, and what is merged less with it in front
            known[text] = len(tokenizer(" " + text, add_special_tokens=False, verbose=False)["input_ids"]) + 1
        return known[text]

    names, special = list[str](), len(tokenizer("", verbose=False)["input_ids"])
    for kind, make in KINDS.items():
        for length in args.lengths:
            chance, lines = random.Random(f"{args.seed} {kind} {length}"), list[str]()
            for _ in range(args.samples):
                made = make(chance)
                text = prompt(chance, made, sentences, count, length - ANSWER_TOKENS - special)
                lines.append(strict_json.dumps({"prompt": text, "answer": made[2]}))
            names.append(f"{kind}_{length}")
            file = Path(args.directory, f"{names[-1]}.jsonl")
            try:
                file.write_text("\n".join([*lines, ""]))
                file.with_suffix(".yaml").write_text(strict_json.dumps(task(names[-1], file), indent=1) + "\n")
            except OSError as error:
                raise OutputError(f"{file} could not be written: {error.strerror}") from None
    return {"directory": args.directory, "tasks": names, "samples": args.samples}


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="the checkpoint whose tokenizer counts tokens")
    parser.add_argument("--directory", required=True, help="where tasks are written; files of their names are replaced")
    lengths = "tokens of a prompt with its answer [4096]"
    parser.add_argument("--lengths", nargs="+", type=whole(LEAST_LENGTH), default=[4096], metavar="N", help=lengths)
    parser.add_argument("--samples", type=whole(1), default=20, metavar="N", help="prompts of a task [20]")
    parser.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0, metavar="N", help="of what is hidden [0]")
    return parser


def main() -> None:
    options.main(work, make_parser(), check)


if __name__ == "__main__":
    main()
