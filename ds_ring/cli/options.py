"""What commands share: options derived from the configuration's fields, exit codes, and the last line of output.

Exit codes: 0 done; 2 an error of the user, in one line; 3 out of memory; 4 the file of --output (or one beside it)
could not be written, 5 standard output could not; 128 + n ended by signal n; 1 an error of ours, with a traceback. The
result is one JSON document on the last line of standard output, without which there was an error. Everything else goes
to standard error; what cannot be written there is lost, and no failure. The file is written first, and the result is
printed whether or not that worked.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from ds_ring.cli import outputs
from ds_ring.cli.parser import Parser, whole
from ds_ring.config import BenchmarkConfig, DType, ParallelConfig, RingConfig, RunConfig, WorkloadConfig
from ds_ring.config.weights import Weights
from ds_ring.errors import (
    ConfigError,
    DsRingError,
    OutputError,
    TransportError,
    UserError,
    has_lost_a_rank,
    is_out_of_memory,
)
from ds_ring.process import heartbeat
from ds_ring.process.arguments import check_arguments
from ds_ring.process.hostfile import check_hostfile
from ds_ring.process.interruption import end_rank_on_sigint, raise_on_signals, received
from ds_ring.process.launcher import FAILED, OUT_OF_MEMORY, PROGRESS
from ds_ring.process.outcome import DONE, NO_MEMORY, NO_OUTPUT, NO_STDOUT, OURS, USERS, is_supervised, tell
from ds_ring.process.parent_watch import end_with_launcher
from ds_ring.utils import strict_json
from ds_ring.utils.checkpoint_dtype import AUTO
from ds_ring.utils.plain_text import one_line
from ds_ring.utils.results import COMPLETE, write_complete
from ds_ring.utils.streams import prepare_streams, print_result

log = logging.getLogger("ds_ring")

Check = Callable[[argparse.Namespace], None]

_OWN = {n: f for n, f in RingConfig.model_fields.items() if n not in ("parallel", "workload", "benchmark")}
WEIGHTS = ("weights", "weights_degree")
"""Arguments for DeepSpeed's keys, see ``config/weights.py``."""
ENGINE = {**ParallelConfig.model_fields, **WorkloadConfig.model_fields, **_OWN}
FIELDS = {**ENGINE, **BenchmarkConfig.model_fields}
"""Every field of our section, each an option of the benchmarks. ``--set`` takes those of ``ENGINE``."""
USUAL = (
    "model", "auto", "dp_size", "pp_size", "ring_degree", "ulysses_degree", "decode", "micro_batch_size",
    "prefill_chunk", "transport", "timeout_s", "decode_graph", "fusion",
)  # fmt: skip
"""What a user of a model is likely to set."""

OUTPUT_HELP = "where to write the result as well; folders that are missing are made"


def run_parser(description: str | None, names: Iterable[str] = tuple(FIELDS)) -> Parser:
    """A parser with ``--config FILE``, ``--output FILE``, and an option for each of the fields ``names``.

    ``--set NAME=VALUE`` overrides any field of the engine's.
    """
    parser = Parser(description)
    parser.add_argument("--config", help="JSON file of ds_configs/")
    parser.add_argument("--output", metavar="FILE.json", help=OUTPUT_HELP)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    group = parser.add_argument_group("overrides of the configuration file")
    group.add_argument("--tp-size", type=whole(1), metavar="N", help="ranks that share each layer (DeepSpeed AutoTP)")
    group.add_argument(
        "--dtype", choices=(*get_args(DType), AUTO), help="weights and activations [auto: the checkpoint's]"
    )
    group.add_argument(
        "--weights", choices=get_args(Weights), help="whole on every rank, sharded among those that share a sequence, "
        "or streamed from host memory; DeepSpeed's zero_optimization [whole]",
    )  # fmt: skip
    any_field = "any other field of the engine's, see docs/configuration.md"
    group.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=any_field)
    for name in names:
        _add_option(group, name, FIELDS[name])
    return parser


def _add_option(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    option = f"--{name.replace('_', '-')}"
    default = "" if field.default is None else f" [{field.default}]"
    text = f"{field.description}{default}".replace("%", "%%")
    if get_origin(field.annotation) is tuple:
        kind = get_args(field.annotation)[0]
        of, metavar = (whole(1), "N") if kind is int else (str, "FILE")
        group.add_argument(option, nargs="+", type=of, metavar=metavar, help=field.description)
    elif field.annotation is bool:
        group.add_argument(option, action="store_true", default=None, help=field.description)
    elif field.annotation is int:
        least = next(bound.ge for bound in field.metadata if hasattr(bound, "ge"))
        group.add_argument(option, type=whole(least), metavar="N", help=text)
    else:
        choices = get_args(field.annotation) if str not in get_args(field.annotation) else None
        group.add_argument(option, choices=choices, help=text)


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the configuration that were given as options, by name."""
    names = {"tp_size", "dtype", *WEIGHTS, *FIELDS}
    return {**_set(args.set), **{n: value for n, value in vars(args).items() if n in names and value is not None}}


def _set(assignments: Sequence[str]) -> dict[str, Any]:
    """The fields of ``--set``: a value is JSON, or else text.

    Raises:
        ConfigError: not NAME=VALUE, or a field that is not the engine's.
    """
    found: dict[str, Any] = {}
    known = {*ENGINE, *WEIGHTS}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or name not in known:
            raise ConfigError(f"--set {assignment} is not NAME=VALUE with a name of {', '.join(sorted(known))}")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def run_config(args: argparse.Namespace) -> RunConfig:
    """The configuration that the parsed options describe; no output is among the files that it names.

    Raises:
        ConfigError, InputError: what the user can put right.
    """
    config = RunConfig.load(args.config, **overrides(args))
    check_outputs(args, config)
    return config


def check_outputs(args: argparse.Namespace, config: RunConfig) -> None:
    """Raise InputError for an output that ``config`` reads: the model's folder, or a text."""
    outputs.check_apart(args, [config.ring.model, *config.benchmark.text])


class Refused(ConfigError):
    """A refusal that has a result, which is printed and written all the same."""

    def __init__(self, text: str, document: dict[str, Any]) -> None:
        super().__init__(text)
        self.document = document


def require(offenders: list[str], message: str) -> None:
    """Raise DsRingError if there are any offenders. ``message`` has a ``{}`` for their list."""
    if offenders:
        raise DsRingError(message.format(", ".join(offenders)))


def main(
    work: Callable[[argparse.Namespace], dict[str, Any] | None],
    parser: argparse.ArgumentParser,
    check: Check = lambda args: None,
    beside: Sequence[str] = (),
) -> None:
    """Parse the options, call ``check`` and ``work``, print and write the result on rank 0, and end the process.

    Args:
        check: refuses options that cannot work, reading what is quickly read; see ``cli/main.py``.
        beside: suffixes of files that ``work`` writes beside ``--output``.
    """
    prepare_streams()
    args, begun, ended = None, False, False
    try:
        if "RANK" in os.environ:
            end_rank_on_sigint()
        else:
            raise_on_signals()
        end_with_launcher()
        _show_log()
        args = parser.parse_args()
        check_hostfile()
        check_arguments()
        if is_first_rank():
            outputs.check(args, beside)
            outputs.remove_partial(args)
        begun = True
        check(args)
        code = _leave_result(args, work(args))
        ended = True
    except BaseException as error:
        code = _say(args, error, begun)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # of --help
        code = code or NO_STDOUT
    sys.stderr.flush()
    leave(code, together=ended)


def _say(args: argparse.Namespace | None, error: BaseException, begun: bool) -> int:
    """Say what went wrong, in one line unless it is our fault, and where rows are; returns the exit code, and tells
    it."""
    code, lines = _said(args, error)
    for line in lines:
        print(line, file=sys.stderr, flush=True)
    if kept := outputs.partial(args) if begun and code and is_first_rank() else []:
        print(f"rows so far are in {', '.join(kept)}", file=sys.stderr, flush=True)
    if scores := outputs.resumable(args) if begun and code != USERS and is_first_rank() else None:
        print(f"scores so far are in {scores}; --resume goes on with them", file=sys.stderr, flush=True)
    with suppress(OSError):
        tell(code)
    if lines:
        why = lines[0].removeprefix("error: ").removeprefix(f"{FAILED}{os.environ.get('RANK', '0')}: ")
        heartbeat.say_why(why, has_lost_a_rank(error))
    return code


def _said(args: argparse.Namespace | None, error: BaseException) -> tuple[int, list[str]]:
    """(exit code, lines) for ``error``."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, SystemExit):  # of --help
        return (error.code if isinstance(error.code, int) else 0), []
    if interrupted := received():  # whatever became of its exception
        return interrupted.exit_code, [str(interrupted)]
    if isinstance(error, UserError):
        if not is_first_rank():
            time.sleep(2)  # all ranks refuse alike: rank 0 speaks first, and the launcher ends the others
        left = _leave_result(args, error.document) if args is not None and isinstance(error, Refused) else DONE
        return left or USERS, [f"error: {one_line(str(error))}"]
    if isinstance(error, TransportError):
        time.sleep(2)  # where it repeats another rank's error, that rank speaks first
    if isinstance(error, OutputError):
        return NO_OUTPUT, [f"{FAILED}{rank}: {one_line(str(error))}"]
    if isinstance(error, DsRingError):
        return OURS, [f"{FAILED}{rank}: {one_line(str(error))}"]
    first_line = str(error).strip().partition("\n")[0]
    trace = traceback.format_exc().rstrip("\n")
    if isinstance(error, Exception) and is_out_of_memory(error):
        why = "; ".join([first_line.rstrip("."), *getattr(error, "__notes__", [])])
        return NO_MEMORY, [f"{OUT_OF_MEMORY}rank {rank}: {one_line(why)}", trace]
    return OURS, [f"{FAILED}{rank}: {type(error).__name__}: {one_line(first_line)}", trace]


def _leave_result(args: argparse.Namespace, document: dict[str, Any] | None) -> int:
    """Write and print the result, on rank 0, each whatever becomes of the other. Returns the exit code."""
    if not is_first_rank():
        return DONE
    code, output = DONE, getattr(args, "output", None)
    if document is None:
        tell(DONE)
        return code
    document = {**document, "status": COMPLETE}
    line = strict_json.dumps(document)
    try:
        write_complete(output if isinstance(output, str) else None, document)
    except OutputError as error:
        _say_failed(str(error))
        code = NO_OUTPUT
    if is_supervised():
        tell(code, line)
        return code
    try:
        print_result(line)
    except OSError as error:
        _say_failed(f"standard output could not be written: {error.strerror}")
        code = code or NO_STDOUT
    return code


def _say_failed(why: str) -> None:
    print(f"{FAILED}{os.environ.get('RANK', '0')}: {one_line(why)}", file=sys.stderr, flush=True)


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Say one line of progress, on rank 0 only."""
    log.info("%s", text)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return f"{PROGRESS}{text}" if record.levelno < logging.WARNING else text


def _show_log() -> None:
    """Send the package's log to standard error: progress from rank 0, warnings from every rank."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    log.addHandler(handler)
    log.setLevel(logging.INFO if is_first_rank() else logging.WARNING)
    log.propagate = False


def leave(code: int, together: bool = False) -> None:
    """End this process; all ranks together where ``code`` is 0, or with ``together``: no other rank failed, though
    rank 0's result could not be written.

    The interpreter's own shutdown is skipped: it would destroy process groups whose threads still run, and abort.
    """
    if (code == 0 or together) and "ds_ring.engine.connect" in sys.modules:
        from deepspeed import comm

        from ds_ring.process.watchdog import process_watchdog

        if comm.is_initialized():
            with process_watchdog.watch("leaving"):
                comm.barrier()
                heartbeat.stop()
                comm.destroy_process_group()
    os._exit(code)
