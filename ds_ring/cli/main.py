"""``ds-ring COMMAND …``: the commands of this package, started with as many ranks as there are GPUs.

    ds-ring generate DIR --prompt "What is the capital of France?"
    ds-ring score DIR a.txt b.txt
    ds-ring evaluate DIR -- --tasks hellaswag
    ds-ring plan DIR --ranks 16 --card H100 --max-length 131072

generate, score, evaluate, bench and bench-generate run under the deepspeed launcher on this host, on all GPUs or on
--ranks of them; on CPUs with one rank, or --ranks. With --hostfile FILE they run on its hosts, of which this is the
first. Other options of the launcher: launch/*.py under deepspeed.
The others (plan, doctor, make-checkpoint, make-tasks, compare, longest) run in this process; compare and longest launch
ranks themselves. "ds-ring COMMAND --help" lists a command's options. Exit codes: ds_ring/cli/options.py. Whatever ends
this process ends the ranks, and the exit code is 0 only where rank 0 has told the result.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from functools import partial

from ds_ring.cli import outputs
from ds_ring.cli.options import run_config
from ds_ring.cli.parser import whole
from ds_ring.errors import ConfigError, UserError
from ds_ring.process import launcher
from ds_ring.process.interruption import Interrupted, raise_on_signals, received
from ds_ring.process.outcome import DONE, NO_STDOUT, OURS, USERS
from ds_ring.process.supervisor import CommandOf, supervise
from ds_ring.utils.plain_text import one_line
from ds_ring.utils.streams import prepare_streams, print_result

LAUNCHED = {
    "generate": "ds_ring.cli.generate",
    "score": "ds_ring.cli.score",
    "evaluate": "ds_ring.cli.evaluate",
    "bench": "benchmarks.cli.bench",
    "bench-generate": "benchmarks.cli.bench_generate",
}
HERE = {
    "plan": "ds_ring.cli.plan",
    "doctor": "ds_ring.cli.doctor",
    "make-checkpoint": "ds_ring.cli.make_checkpoint",
    "make-tasks": "ds_ring.cli.make_tasks",
    "compare": "benchmarks.cli.compare",
    "longest": "benchmarks.cli.longest",
}
MOST_ON_CPUS = 64
"""Ranks that are started without GPUs."""
EXAMPLES = {"--ranks": "N, a whole number of at least 1", "--hostfile": "FILE"}
"""Options of ours, and what their values are."""
RANKS_HELP = """[--ranks N | --hostfile FILE] and the options below

  --ranks N             processes on this host [one on each GPU; on CPUs one]
  --hostfile FILE       hosts and their slots, one a line ("name slots=8"), of which this host is the first
"""
TAKES_MODEL = ("generate", "score", "evaluate", "plan", "doctor", "bench-generate", "make-tasks")
"""Commands whose first argument may be the model."""


def main() -> None:
    prepare_streams()
    raise_on_signals()
    try:
        code = _run(sys.argv[1:])
    except (Exception, Interrupted) as error:
        code = _say(error)
    sys.stderr.flush()
    os._exit(code)  # what is left in standard output cannot be written


def _say(error: BaseException) -> int:
    """Say what went wrong, in one line unless it is our fault; returns the exit code."""
    if interrupted := received():
        print(interrupted, file=sys.stderr)
        return interrupted.exit_code
    if isinstance(error, UserError):
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return USERS
    traceback.print_exception(error)
    return OURS


def _run(arguments: Sequence[str]) -> int:
    """The exit code. Commands of ``HERE`` end the process themselves."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return _print(__doc__ or "")
    command, *options = arguments
    if command not in LAUNCHED | HERE:
        raise ConfigError(f"there is no command {command}; take one of {', '.join([*LAUNCHED, *HERE])}")
    options = named(command, options)
    if command in HERE or {"-h", "--help"} & set(options):
        if command in LAUNCHED:
            leading = " DIR FILE…" if command == "score" else " DIR" if command in TAKES_MODEL else ""
            if failed := _print(f"ds-ring {command}{leading} {RANKS_HELP}"):
                return failed
        sys.argv = [f"ds-ring {command}", *options]
        runpy.run_module((LAUNCHED | HERE)[command], run_name="__main__")
        return DONE
    hostfile, options = value_of("--hostfile", options)
    given, options = ranks_of(options)
    module = importlib.import_module(LAUNCHED[command])
    args = module.make_parser().parse_args(options)
    outputs.check(args)
    if hostfile is not None:
        if given is not None:
            raise ConfigError("--ranks and --hostfile exclude each other: the hostfile's slots are the ranks")
        hosts = launcher.check_hosts(hostfile)
        module.check(args, sum(host.slots for host in hosts))
        config = run_config(args)
        with launcher.reserved_port() as port:
            environment = launcher.hosts_environment(hosts[0].slots)
            of = partial(launcher.hosts_command, LAUNCHED[command], hostfile, port, options)
            return _supervised(args, lambda told: of(environment | dict(told)), environment, config.ring.timeout_s)
    module.check(args, given)
    gpus = launcher.gpu_count()  # imports torch
    ranks = given or gpus or 1
    if ranks > (gpus or MOST_ON_CPUS):
        limit = f"there are {gpus} GPUs" if gpus else f"without GPUs at most {MOST_ON_CPUS} are started"
        raise ConfigError(f"--ranks {ranks}: {limit}")
    if given is None:
        module.check(args, ranks)
    config = run_config(args)
    with launcher.reserved_port() as port:
        line = launcher.launch_command(LAUNCHED[command], ranks, port, options)
        environment = launcher.environment_of(ranks, (launcher.VISIBLE_GPUS,))
        return _supervised(args, line, environment, config.ring.timeout_s)


def _supervised(
    args: argparse.Namespace, command: Sequence[str] | CommandOf, environment: dict[str, str], timeout_s: float
) -> int:
    """As ``supervise``; a rank that is killed while it writes an output leaves nothing beside that."""
    try:
        return supervise(command, environment, timeout_s)
    finally:
        outputs.remove_unwritten(args)


def _print(text: str) -> int:
    """Print help; returns the exit code."""
    try:
        print_result(text)
    except OSError:
        return NO_STDOUT
    return DONE


def named(command: str, options: Sequence[str]) -> list[str]:
    """``options`` with leading arguments by their names: the model and, of score, the documents after it."""
    count = next((i for i, option in enumerate(options) if option.startswith("-")), len(options))
    leading, rest = list(options[:count]), list(options[count:])
    if not leading or command not in TAKES_MODEL:
        return [*leading, *rest]
    model, *documents = leading
    if documents and command != "score":
        raise ConfigError(f"{documents[0]}: {command} takes one model; its other arguments have names, see --help")
    return ["--model", model, *(["--text", *documents] if documents else []), *rest]


def ranks_of(options: Sequence[str]) -> tuple[int | None, list[str]]:
    """(how many ranks to start, the other options); None without ``--ranks``: one on each visible GPU, on CPUs one.

    Raises:
        ConfigError: not a whole number of at least 1.
    """
    value, options = value_of("--ranks", options)
    if value is None:
        return None, options
    try:
        ranks = whole(1)(value)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--ranks {error}") from None
    return ranks, options


def value_of(name: str, options: Sequence[str]) -> tuple[str | None, list[str]]:
    """(the value of an option of ours; the other options); None where it is not given.

    Raises:
        ConfigError: given without a value.
    """
    words = [
        part for option in options for part in (option.split("=", 1) if option.startswith(f"{name}=") else [option])
    ]
    if name not in words:
        return None, words
    at = words.index(name)
    value = words[at + 1] if at + 1 < len(words) else ""
    if not value or value.startswith("--"):
        raise ConfigError(f"{name} has no value: give {name} {EXAMPLES[name]}")
    return value, words[:at] + words[at + 2 :]


if __name__ == "__main__":
    main()
