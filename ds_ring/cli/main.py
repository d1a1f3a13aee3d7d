"""``ds-ring COMMAND …``: the commands of this package, started with as many ranks as there are GPUs.

    ds-ring generate DIR --prompt "What is the capital of France?"
    ds-ring score DIR a.txt b.txt
    ds-ring plan DIR --ranks 16 --card H100 --max-length 131072

generate, score, bench and bench-generate run under the deepspeed launcher on this host, on all GPUs or on --ranks of
them; on CPUs with one rank, or --ranks. Several hosts, and other options of the launcher: launch/*.py under deepspeed.
The others (plan, doctor, make-checkpoint, compare, longest) run in this process; compare and longest launch ranks
themselves. "ds-ring COMMAND --help" lists a command's options.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from ds_ring.errors import ConfigError, UserError
from ds_ring.process import launcher

LAUNCHED = {
    "generate": "ds_ring.cli.generate",
    "score": "ds_ring.cli.score",
    "bench": "benchmarks.cli.bench",
    "bench-generate": "benchmarks.cli.bench_generate",
}
HERE = {
    "plan": "ds_ring.cli.plan",
    "doctor": "ds_ring.cli.doctor",
    "make-checkpoint": "ds_ring.cli.make_checkpoint",
    "compare": "benchmarks.cli.compare",
    "longest": "benchmarks.cli.longest",
}
TAKES_MODEL = ("generate", "score", "plan", "doctor", "bench-generate")
"""Commands whose first argument may be the model."""


def main() -> None:
    try:
        _run(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _run(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    command, *options = arguments
    if command not in LAUNCHED | HERE:
        raise ConfigError(f"there is no command {command}; take one of {', '.join([*LAUNCHED, *HERE])}")
    options = named(command, options)
    if command in HERE or "-h" in options or "--help" in options:
        if command in LAUNCHED:
            leading = " DIR FILE…" if command == "score" else " DIR" if command in TAKES_MODEL else ""
            print(f"ds-ring {command}{leading} [--ranks N] and these options:\n")
        sys.argv = [f"ds-ring {command}", *options]
        runpy.run_module((LAUNCHED | HERE)[command], run_name="__main__")
        return
    ranks, options = ranks_of(options)
    with launcher.reserved_port() as port:
        line = launcher.launch_command(LAUNCHED[command], ranks, port, options)
        sys.stdout.flush()
        # In place of this process: signals and the exit code are the launcher's.
        os.execve(line[0], line, launcher.environment_of(ranks, (launcher.VISIBLE_GPUS,)))


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


def ranks_of(options: Sequence[str]) -> tuple[int, list[str]]:
    """(how many ranks to start, the other options); without ``--ranks`` one on each visible GPU, on CPUs one.

    Raises:
        ConfigError: not a whole number of at least 1.
    """
    options = [part for option in options for part in _by_word(option)]
    if "--ranks" not in options:
        return launcher.gpu_count() or 1, options
    at = options.index("--ranks")
    value = options[at + 1] if at + 1 < len(options) else ""
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"--ranks {value} must be a whole number of at least 1")
    return int(value), options[:at] + options[at + 2 :]


def _by_word(option: str) -> list[str]:
    return option.split("=", 1) if option.startswith("--ranks=") else [option]


if __name__ == "__main__":
    main()
