"""Bad values of every option of every command: each is refused, in one line, or lies in what the option means."""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import random
from pathlib import Path

import pytest

from benchmarks.cli.local_hosts import MOST_HOSTS
from ds_ring.cli import outputs
from ds_ring.cli.make_tasks import LEAST_LENGTH
from ds_ring.cli.options import run_config
from ds_ring.cli.parser import whole
from ds_ring.config.sections import LEAST_TEMPERATURE, MOST
from ds_ring.errors import UserError
from ds_ring.planning.limits import MOST_RANKS
from ds_ring.process.launcher import ROOT
from ds_ring.utils.plain_text import one_line

MODULES = {
    file.stem: importlib.import_module(f"{package}.cli.{file.stem}")
    for package in ("ds_ring", "benchmarks")
    for file in sorted((ROOT / package / "cli").glob("*.py"))
    if (ROOT / "launch" / file.name).is_file()
}
LAUNCHED = ("generate", "score", "bench", "bench_generate")
NUMBERS = [
    "", " ", "abc", "nan", "inf", "-inf", "-1", "-0.5", "0", "0.0", "1e999", "-1e999", "1e-45", "0x10", "1_0", "１",
    "²", "1,5", "1e3", "9" * 40, "9" * 5000, str(2**64), str(2**64 - 1), str(-(2**63)), str(MOST), str(MOST + 1), "1.5",
    "+1", "\udc80", "1\n2", "\x1b[31m", "true", "null", "[]", "0.02", "1e308", "65536", "65537", "١",
]  # fmt: skip
FLOATS = {
    "temperature": lambda x: x == 0 or x >= LEAST_TEMPERATURE,
    "top_p": lambda x: 0 < x <= 1, "granularity": lambda x: 0 < x <= 1,
    "limit": lambda x: 0 < x < 2**40, "memory_limit": lambda x: x > 0, "limit_s": lambda x: 0 <= x < 2**40,
    "seconds": lambda x: x > 0, "network_gbps": lambda x: x > 0, "warm_s": lambda x: x >= 0,
}  # fmt: skip
FROM_0 = {
    "top_k", "gather_limit_mib", "block_tokens", "prefill_chunk", "warmup", "warmup_batch_size", "sustain_s",
    "timeout_s",
}  # fmt: skip
WHOLE = {
    "seed": lambda n: 0 <= n < 2**64, "master_port": lambda n: 1 <= n < 65536, "ranks": lambda n: 1 <= n <= MOST_RANKS,
    "in_flight": lambda n: 2 <= n <= MOST, "gpus": lambda n: 2 <= n <= 65536,
    "hosts": lambda n: 1 <= n <= MOST_HOSTS, "at_once": lambda n: 1 <= n <= 64,
    "lengths": lambda n: LEAST_LENGTH <= n <= MOST,
    **{name: lambda n: 0 <= n <= MOST for name in FROM_0},
}  # fmt: skip


def means(name: str, value: object) -> bool:
    """Whether a value that was accepted is one that the option can mean."""
    if isinstance(value, list):
        return all(means(name, each) for each in value)
    if isinstance(value, float):
        return math.isfinite(value) and FLOATS[name](value)
    assert type(value) is int, (name, value)
    return WHOLE.get(name, lambda n: 1 <= n <= MOST)(value)


def refusal(parser: argparse.ArgumentParser, words: list[str]) -> str | argparse.Namespace:
    """The line of a refusal, or what was parsed."""
    try:
        return parser.parse_args(words)
    except UserError as error:
        return str(error)


def numeric(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.type is not None and action.help != argparse.SUPPRESS]


def required(parser: argparse.ArgumentParser, but: str = "") -> list[str]:
    """Options without which a parser refuses everything, with values that it takes."""
    words = {"--ranks": "2", "--directory": "new", "--model": "model", "--panels": "8", "--output": "out.json"}
    required = [action for action in parser._actions if action.required and action.dest != but]
    named = [(a.option_strings[0], words[a.option_strings[0]]) for a in required if a.option_strings]
    after = [word for action in required if not action.option_strings for word in ("--", "command")]
    one_of = ["--config", "c.json"] if parser._mutually_exclusive_groups else []
    return [*one_of, *(word for pair in named for word in pair), *after]


CASES = [
    (name, action.dest) for name, module in MODULES.items() for action in numeric(module.make_parser())
]  # fmt: skip


def test_there_are_as_many_commands_and_options_as_there_are():
    assert len(MODULES) == len(list((ROOT / "launch").glob("*.py")))
    assert len(CASES) > 100


@pytest.mark.parametrize(("name", "dest"), CASES, ids=lambda word: word)
def test_a_number_is_refused_in_one_line_or_can_be_meant(name, dest):
    parser = MODULES[name].make_parser()
    action = next(action for action in parser._actions if action.dest == dest)
    refused = 0
    for text in NUMBERS:
        found = refusal(parser, [f"{action.option_strings[0]}={text}", *required(parser, dest)])
        if isinstance(found, str):
            refused += 1
            assert action.option_strings[0] in found
            assert "\n" not in one_line(found)
            assert "Traceback" not in found
            continue
        value = getattr(found, dest)
        if action.type is not str:
            assert means(dest, value), (text, value)
    if action.type is not str:
        assert refused > 15


@pytest.mark.parametrize("name", MODULES)
def test_what_is_no_option_is_refused(name):
    parser = MODULES[name].make_parser()
    needed = required(parser)
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    misspelt = {option[:-1] for option in options if len(option) > 5} - set(options)
    takes_words = any(not action.option_strings for action in parser._actions)
    for word in [*misspelt, "--no-such", "-x", "--=", "--\udc80", *([] if takes_words else ["a word"])]:
        found = refusal(parser, [word, "1", *needed])
        assert isinstance(found, str), word
        assert found.endswith("; --help lists the options")


FILES = ["missing", "folder", "empty", "blank", "binary", "list.json", "number.json", "deep.json", "unknown.json",
         "types.json", "huge.json", "loop", "x" * 300, "missing/under", "nul\x01name"]  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("loop").symlink_to("loop")
    for name, data in {
        "empty": b"", "blank": b" \n", "binary": bytes(range(256)), "list.json": b"[]", "number.json": b"1",
        "deep.json": b"[" * 100_000, "unknown.json": b'{"ds_ring": {"no": 1}}', "nul\x01name": b"\xff\xfe\x00",
        "types.json": b'{"ds_ring": {"parallel": {"ring_degree": true}}}', "text": b"a text",
        "huge.json": b'{"ds_ring": {"workload": {"max_length": 1' + b"0" * 5000 + b"}}}",
    }.items():  # fmt: skip
        Path(name).write_bytes(data)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", LAUNCHED)
def test_a_bad_file_is_refused_before_ranks_start(name):
    module = MODULES[name]
    parser = module.make_parser()
    good = {"--model": "model", "--output": "out.json"}
    good |= {"score": {"--text": "text"}, "bench": {}}.get(name, {"--prompt-file": "text"})
    takes = [*good, "--config", *(["--trace", "--references", "--text"] if name == "bench" else [])]

    def words(given):
        return [word for option, value in given.items() for word in (option, value)]

    def refused(given):
        try:
            args = parser.parse_args(words(given))
            outputs.check(args)
            module.check(args, 1)
        except UserError as error:
            return one_line(str(error))
        return ""

    assert refused(good) == ""
    for option, file in itertools.product(takes, FILES):
        said = refused(good | {option: file})
        written, where = option in ("--output", "--trace"), Path(file[:200])
        fine = written and (not where.is_dir() and len(file) < 200 and file != "loop")
        fine = fine or (option == "--references" and where.is_file()) or (option, file) == ("--text", "list.json")
        fine = fine or (option in ("--prompt-file", "--text") and file.endswith(".json"))
        assert bool(said) != fine, (option, file, said)
        assert len(said.splitlines()) <= 1
        assert not said or file[:10].split("\x01")[0] in said or option == "--config", (option, file, said)


@pytest.mark.usefixtures("files")
def test_random_settings_are_refused_or_mean_something():
    chance = random.Random(19)
    parser = MODULES["bench"].make_parser()
    fields = [action for action in parser._actions if action.dest not in ("help", "config", "output", "local_rank")]
    values = [*NUMBERS, "auto", "full", "model", "in_flight=3", "in_flight=true", "timeout_s=1e400", "dp_size={}", "="]
    accepted = 0
    for _ in range(600):
        words = ["--config", chance.choice(["types.json", "unknown.json"])] if chance.random() < 0.05 else []
        for action in chance.sample(fields, chance.randint(1, 3)):
            words += [action.option_strings[0], *([] if action.nargs == 0 else [chance.choice(values)])]
        try:
            config = run_config(parser.parse_args(words))
        except UserError:
            continue
        accepted += 1
        numbers = [*config.parallel, *config.workload, *config.benchmark]
        assert all(0 <= value <= MOST for _, value in numbers if type(value) is int)
        assert config.topology.world_size >= 1
    assert 20 < accepted < 300


@pytest.mark.parametrize(
    ("text", "limits"),
    [("0", "of at least 1"), ("-" + "9" * 40, "of at least 1"), ("x", "of at least 1"),
     (str(MOST + 1), f"from 1 to {MOST}"), ("9" * 40, f"from 1 to {MOST}")],
)  # fmt: skip
def test_a_number_that_is_too_large_is_told_the_greatest(text, limits):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        whole(1)(text)
    assert str(error.value) == f"{text} must be a whole number {limits}"
