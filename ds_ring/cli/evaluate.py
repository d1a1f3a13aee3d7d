"""Evaluate a model on tasks of the lm_eval package, in any layout.

    ds-ring evaluate DIR -- --tasks hellaswag --num_fewshot 5
    deepspeed --num_gpus 4 launch/evaluate.py --model DIR --ring-degree 4 -- --tasks niah_single_1 --output_path out

What stands behind -- are options of lm_eval's own command line (lm-eval run --help), which is what runs: on every rank
alike, with this model in place of its own. Its tables appear on standard error, and what it writes is written by rank
0. The last line of standard output is one JSON document with the results. lm_eval: pip install 'ds_ring[eval]'.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from typing import Any

from ds_ring.cli import inputs, options
from ds_ring.cli.generate import planned_by_default
from ds_ring.cli.parser import Parser
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, UserError, in_one_line

NO_LM_EVAL = "the package lm_eval is not installed; pip install 'ds_ring[eval]', or lm_eval"
NO_TASKS = "no tasks: give options of lm_eval behind --, such as -- --tasks hellaswag"
REFUSED = {
    "model": "DIR, or --model in front of --, is the model",
    "device": "the launch decides on devices",
    "config": "give its settings as options",
    "trust_remote_code": "no code of a checkpoint or data set is run",
}
"""Options of lm_eval that mean nothing here, and what to do instead."""
MODEL_ARGS = (
    "tokenizer", "use_fast_tokenizer", "add_bos_token", "prefix_token_id", "max_length", "truncation",
    "think_end_token", "enable_thinking", "chat_template_args",
)  # fmt: skip
"""What --model_args may say: of tokens and templates, not of weights or devices."""
CACHES = ("use_cache", "cache_requests")
"""Options of lm_eval for files that each process reads and writes."""
OUTPUTS = ("output_path", "log_samples", "write_out", "show_config", "wandb_args", "trackio_args", "hf_hub_log_args")
"""Options of lm_eval for what rank 0 alone writes."""
KEPT = ("lm_eval_version", "results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
"""What of lm_eval's results is in ours."""


def check(args: argparse.Namespace, ranks: int | None = None) -> None:
    """Raise UserError for options that cannot work, as far as that shows without the model and the tasks."""
    asked = parsed(args.lm_eval)
    world = ranks or int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and (cached := [name for name in CACHES if getattr(asked, name)]):
        raise ConfigError(f"lm_eval's --{cached[0]} is for one process, these are {world} ranks; leave it out")
    config = planned_by_default(run_config(args, asked), ranks)
    inputs.check_degrees(config, ranks)
    inputs.check_checkpoint(config)


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """Options of lm_eval's command line, by its own parser.

    Raises:
        ConfigError: lm_eval is not installed, or an option is wrong or means nothing here.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(NO_LM_EVAL)
    if not words:
        raise ConfigError(NO_TASKS)
    from lm_eval._cli import HarnessCLI

    own, said = sys.argv, io.StringIO()
    sys.argv = ["lm-eval", "run", *(word for place, word in enumerate(words) if place or word != "run")]
    try:
        with redirect_stderr(said):
            found: argparse.Namespace = HarnessCLI().parse_args()
    except SystemExit as error:
        if not error.code:  # of --help
            raise
        raise ConfigError(f"lm_eval: {said.getvalue().strip().rpartition('error: ')[2]}") from None
    finally:
        sys.argv = own
    if not found.tasks:
        raise ConfigError(NO_TASKS)
    for name, instead in REFUSED.items():
        if getattr(found, name, None):
            raise ConfigError(f"lm_eval's --{name} is not taken: {instead}")
    if unknown := sorted(set(found.model_args or {}) - set(MODEL_ARGS)):
        raise ConfigError(f"lm_eval's --model_args {unknown[0]} is not taken; there may be {', '.join(MODEL_ARGS)}")
    size = getattr(found, "batch_size", "1")
    if not (size.isascii() and size.isdecimal() and int(size) > 0):
        raise ConfigError(f"lm_eval's --batch_size {size} must be a whole number of at least 1")
    return found


def run_config(args: argparse.Namespace, asked: argparse.Namespace) -> RunConfig:
    """The configuration of our options, with micro-batches of lm_eval's batch size unless they are given."""
    config = options.run_config(args)
    size = int(getattr(asked, "batch_size", "1"))
    given = config.workload.model_fields_set
    return config if "micro_batch_size" in given else RunConfig.load(config, micro_batch_size=size)


def work(args: argparse.Namespace) -> dict[str, Any]:
    asked = parsed(args.lm_eval)
    config = planned_by_default(run_config(args, asked))
    from ds_ring import api
    from ds_ring.hf.checkpoint import Checkpoint
    from ds_ring.utils import results

    Checkpoint.open(config.checkpoint)
    given = config.workload.max_length if "max_length" in config.workload.model_fields_set else None
    config = api.with_planned_degrees(sized(config))
    found = evaluated(config, asked, given)
    return {**results.provenance(), "config": config.document(), "layout": config.label, "lm_eval": found}


def sized(config: RunConfig) -> RunConfig:
    """``config`` with what tasks may ask for, unless it is given: requests of the model's greatest length, of which
    every rank could have a micro-batch."""
    from ds_ring.hf.dims import model_dims
    from ds_ring.utils.model_config import read_config

    work, ranks = config.workload, int(os.environ.get("WORLD_SIZE", "1"))
    limit = model_dims(read_config(config.checkpoint)).intended_positions
    own = {"batch_size": ranks * work.micro_batch_size, "max_length": limit or work.max_length}
    return RunConfig.load(config, **{n: value for n, value in own.items() if n not in work.model_fields_set})


def evaluated(config: RunConfig, asked: argparse.Namespace, max_length: int | None = None) -> dict[str, Any]:
    """Run lm_eval's command line with the options ``asked``, on every rank alike. Collective.

    Args:
        max_length: tokens of the longest request, where that is not the model's; longer ones are cut on the left.

    Returns:
        ``KEPT``, on each host's first rank; elsewhere nothing.
    """
    from lm_eval.utils import setup_logging

    from ds_ring import api
    from ds_ring.cli.lm_eval_model import RingLM

    first, begun = options.is_first_rank(), list[str]()

    def load() -> Any:
        begun.append("weights load")
        return api.from_pretrained(config=config)

    RingLM.load, RingLM.shows_progress = load, first
    setup_logging("INFO" if first else "ERROR")
    asked = argparse.Namespace(**vars(asked))
    longest = {} if max_length is None else {"max_length": max_length}
    asked.model, asked.model_args = "ds_ring", {"pretrained": config.checkpoint, **longest, **(asked.model_args or {})}
    asked.batch_size = str(config.topology.dp * config.workload.micro_batch_size)
    if not first:
        for name in OUTPUTS:
            setattr(asked, name, None)
    with ExitStack() as stack:
        tables = sys.stderr if first else stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(tables))
        found = stack.enter_context(_results())
        try:
            asked.func(asked)
        except ValueError as error:
            if begun or isinstance(error, UserError):
                raise
            raise ConfigError(f"lm_eval: {in_one_line(error)}") from None
    return {name: _plain(value) for results in found if results for name, value in results.items() if name in KEPT}


@contextmanager
def _results() -> Iterator[list[dict[str, Any] | None]]:
    """A list that gets what lm_eval's evaluation returns; tasks that cannot be loaded are refused in one line."""
    import lm_eval

    evaluate, found = lm_eval.simple_evaluate, list[dict[str, Any] | None]()

    def kept(*, task_manager: Any, **rest: Any) -> Any:
        task_manager.load = _refusing(task_manager.load)
        found.append(evaluate(task_manager=task_manager, **rest))
        return found[0]

    lm_eval.simple_evaluate = kept
    try:
        yield found
    finally:
        del lm_eval.simple_evaluate  # the package makes its own on demand


def _refusing(load: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def loaded(tasks: Any) -> Any:
        try:
            return load(tasks)
        except Exception as error:  # of data sets, hubs and files, of any kind
            raise ConfigError(f"lm_eval cannot load the tasks: {in_one_line(error)}") from None

    return loaded


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: null for what is no number, text for what is no JSON."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def make_parser() -> Parser:
    parser = options.run_parser(__doc__, (*options.USUAL, "max_length"))
    behind = "behind --: options of lm_eval's command line, with --tasks at least"
    parser.add_argument("lm_eval", nargs="*", metavar="OPTION", help=behind)
    return parser


def main() -> None:
    options.main(work, make_parser(), check)


if __name__ == "__main__":
    main()
