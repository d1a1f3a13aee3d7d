"""Which runner a configuration asks for, ours or a baseline's, and engines of either.

A baseline's code is imported where it is asked for: it may not be installed, and some change the process that imports
them.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from benchmarks.baselines.rules import check_installed
from ds_ring import api
from ds_ring.config import RunConfig
from ds_ring.engine.engine import Engine
from ds_ring.engine.model_runner import ModelRunner


def baseline_of(config: RunConfig) -> type[ModelRunner] | None:
    """The runner of another implementation; None where the layout is ours.

    Raises:
        ConfigError: it is not installed.
    """
    check_installed(config)
    if config.benchmark.implementation == "deepspeed_ulysses":
        from benchmarks.baselines.deepspeed_ulysses import DeepSpeedUlyssesRunner

        return DeepSpeedUlyssesRunner
    if config.benchmark.implementation == "context_parallel":
        from benchmarks.baselines.context_parallel import ContextParallelRunner

        return ContextParallelRunner
    if config.benchmark.implementation == "yunchang":
        from benchmarks.baselines.yunchang import YunchangRunner

        return YunchangRunner
    return None


def from_pretrained(config: RunConfig) -> Engine:
    """``ds_ring.from_pretrained`` of ``config``, whoever's layout it is."""
    return api.from_pretrained(config=config, runner=baseline_of(config))


def init_inference(
    model: PreTrainedModel, config: RunConfig | dict[str, Any] | None = None, **overrides: Any
) -> Engine:
    """``ds_ring.init_inference``, whoever's layout it is."""
    run = RunConfig.load(config, **overrides)
    return api.init_inference(model, run, runner=baseline_of(run))
