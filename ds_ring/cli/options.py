"""What commands share: options derived from the configuration's fields, exit codes, and the last line of output.

Exit codes: 0 done; 2 an error of the user, in one line; 3 out of memory; 1 an error of ours, with a traceback. The
result is one JSON document on the last line of standard output. Everything else goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from errno import EISDIR
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from ds_ring.config import BenchmarkConfig, DType, ParallelConfig, RingConfig, RunConfig, WorkloadConfig
from ds_ring.errors import ConfigError, DsRingError, InputError, TransportError, UserError, is_out_of_memory
from ds_ring.process.hostfile import check_hostfile
from ds_ring.process.launcher import FAILED, OUT_OF_MEMORY, PROGRESS
from ds_ring.process.parent_watch import end_with_launcher
from ds_ring.utils.results import write_json

log = logging.getLogger("ds_ring")

_OWN = {n: f for n, f in RingConfig.model_fields.items() if n not in ("parallel", "workload", "benchmark")}
ENGINE = {**ParallelConfig.model_fields, **WorkloadConfig.model_fields, **_OWN}
FIELDS = {**ENGINE, **BenchmarkConfig.model_fields}
"""Every field of our section, each an option of the benchmarks. ``--set`` takes those of ``ENGINE``."""
USUAL = (
    "model", "auto", "dp_size", "pp_size", "ring_degree", "ulysses_degree", "decode", "micro_batch_size",
    "prefill_chunk", "transport", "timeout_s", "decode_graph", "fusion",
)  # fmt: skip
"""What a user of a model is likely to set."""


def run_parser(description: str | None, names: Iterable[str] = tuple(FIELDS)) -> argparse.ArgumentParser:
    """A parser with ``--config FILE``, ``--output FILE``, and an option for each of the fields ``names``.

    ``--set NAME=VALUE`` overrides any field of the engine's.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="JSON file of ds_configs/")
    parser.add_argument("--output", metavar="FILE.json", help="where to write the result as well")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    group = parser.add_argument_group("overrides of the configuration file")
    group.add_argument("--tp-size", type=int, metavar="N", help="ranks that share each layer (DeepSpeed AutoTP)")
    group.add_argument("--dtype", choices=get_args(DType), help="weights and activations [the checkpoint's]")
    any_field = "any other field of the engine's, see docs/configuration.md"
    group.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=any_field)
    for name in names:
        _add_option(group, name, FIELDS[name])
    return parser


def _add_option(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    option = f"--{name.replace('_', '-')}"
    text = f"{field.description} [{field.default}]".replace("%", "%%")
    if get_origin(field.annotation) is tuple:
        kind = get_args(field.annotation)[0]
        group.add_argument(option, nargs="+", type=kind, metavar="N" if kind is int else "FILE", help=field.description)
    elif field.annotation is bool:
        group.add_argument(option, action="store_true", default=None, help=field.description)
    elif field.annotation is int:
        group.add_argument(option, type=int, metavar="N", help=text)
    else:
        choices = get_args(field.annotation) if str not in get_args(field.annotation) else None
        group.add_argument(option, choices=choices, help=text)


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the configuration that were given as options, by name."""
    names = {"tp_size", "dtype", *FIELDS}
    return {**_set(args.set), **{n: value for n, value in vars(args).items() if n in names and value is not None}}


def _set(assignments: Sequence[str]) -> dict[str, Any]:
    """The fields of ``--set``: a value is JSON, or else text.

    Raises:
        ConfigError: not NAME=VALUE, or a field that is not the engine's.
    """
    found: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or name not in ENGINE:
            raise ConfigError(f"--set {assignment} is not NAME=VALUE with a name of {', '.join(sorted(ENGINE))}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def run_config(args: argparse.Namespace) -> RunConfig:
    """The configuration that the parsed options describe."""
    return RunConfig.load(args.config, **overrides(args))


def require(offenders: list[str], message: str) -> None:
    """Raise DsRingError if there are any offenders. ``message`` has a ``{}`` for their list."""
    if offenders:
        raise DsRingError(message.format(", ".join(offenders)))


def main(work: Callable[[argparse.Namespace], dict[str, Any] | None], parser: argparse.ArgumentParser) -> None:
    """Parse the options, call ``work``, print and write its result on rank 0, and end the process."""
    args = parser.parse_args()
    end_with_launcher()
    _show_log()
    code = 0
    try:
        check_hostfile()
        if is_first_rank():
            _check_output(getattr(args, "output", None))
        document = work(args)
        if is_first_rank() and document is not None:
            print(json.dumps(document), flush=True)  # before the file: the disk may be full
            if args.output:
                write_json(args.output, document)
    except UserError as error:
        if not is_first_rank():
            time.sleep(2)  # all ranks refuse alike: rank 0 speaks first, and the launcher ends the others
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except DsRingError as error:
        if isinstance(error, TransportError):
            time.sleep(2)  # where it repeats another rank's error, that rank speaks first
        _say_failed(str(error))
        code = 1
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        if is_out_of_memory(error):
            why = "; ".join([first_line.rstrip("."), *getattr(error, "__notes__", [])])
            print(f"{OUT_OF_MEMORY}rank {os.environ.get('RANK', '0')}: {why}", file=sys.stderr, flush=True)
            code = 3
        else:
            _say_failed(f"{type(error).__name__}: {first_line}")
            code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    leave(code)


def _say_failed(why: str) -> None:
    print(f"{FAILED}{os.environ.get('RANK', '0')}: {why}", file=sys.stderr, flush=True)


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


def _check_output(output: str | list[str] | None) -> None:
    """Raise InputError where an output file cannot be written. Called before any work is done."""
    for name in [output] if isinstance(output, str) else output or []:
        _check_file(Path(name))


def _check_file(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise InputError(f"--output {file} cannot be written: {error.strerror}") from None


def leave(code: int) -> None:
    """End this process; where ``code`` is 0, all ranks together.

    The interpreter's own shutdown is skipped: it would destroy process groups whose threads still run, and abort.
    """
    if code == 0 and "ds_ring.engine.connect" in sys.modules:
        from deepspeed import comm

        from ds_ring.process import heartbeat
        from ds_ring.process.watchdog import process_watchdog

        if comm.is_initialized():
            with process_watchdog.watch("leaving"):
                comm.barrier()
                heartbeat.stop()
                comm.destroy_process_group()
    os._exit(code)
