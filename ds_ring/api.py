"""``from_pretrained`` and ``init_inference``: from a configuration to an engine.

Both check the configuration, then connect the ranks of this launch, then load or take the weights.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ds_ring.config import RunConfig
from ds_ring.config.weights import weights_degree_of
from ds_ring.engine.connect import connect, local_device, world_size
from ds_ring.engine.dry_run import dry_run
from ds_ring.engine.engine import Engine
from ds_ring.engine.model_runner import ModelRunner
from ds_ring.engine.oom import weights_note, with_memory_note
from ds_ring.engine.sequence_parallel import SequenceParallelRunner
from ds_ring.engine.tensor_pipeline import TensorPipelineRunner
from ds_ring.errors import ConfigError
from ds_ring.hf import fingerprint
from ds_ring.hf.attention import float_buffers_kept, torch_dtype
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.hf.decoder import Decoder, own_configs
from ds_ring.hf.dims import model_dims
from ds_ring.hf.generation_settings import read_generation_config
from ds_ring.hf.layer_loading import LayerLoader
from ds_ring.hf.loading import load_model, load_stage, weight_bytes
from ds_ring.hf.stage import keep_stage
from ds_ring.hf.tensor_fit import check_fit
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.degrees import stage_layers
from ds_ring.planning import plan
from ds_ring.planning.cards import card_of
from ds_ring.planning.validation import check_layout
from ds_ring.process.hostfile import check_hostfile
from ds_ring.process.network import ranks_of_host
from ds_ring.process.watchdog import process_watchdog
from ds_ring.transport.mesh import Mesh
from ds_ring.utils.model_config import read_config
from ds_ring.utils.releases import check_transformers

__all__ = ["from_pretrained", "init_inference"]

log = logging.getLogger("ds_ring")


def from_pretrained(
    path: str | Path | None = None,
    config: str | Path | dict[str, Any] | RunConfig | None = None,
    *,
    runner: type[ModelRunner] | None = None,
    **overrides: Any,
) -> Engine:
    """A checkpoint over all ranks of this launch.

    Call it on every rank of a script that the ``deepspeed`` launcher runs; outside a launcher it is a world of one.

    Args:
        path: checkpoint directory with safetensors; None takes ``ds_ring.model`` of the configuration.
        config: path of a JSON file of ``ds_configs/``, a dict of the same form, a RunConfig, or None for defaults.
        runner: another layout than those of ``ds_ring.engine``, such as a baseline of ``benchmarks``; it gets the whole
            model.
        overrides: fields by name, e.g. ``ring_degree=4``; see ``RunConfig.load``.

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError: on every rank alike, before ranks connect and weights load.
        DisagreementError: on every rank alike, where their configurations, packages or checkpoints differ.
    """
    check_transformers()
    check_hostfile()
    run = RunConfig.load(config, **{"model": str(path) if path else None, **overrides})
    path = run.checkpoint
    checkpoint = Checkpoint.open(path)
    run = with_weights_degree(with_planned_degrees(run))
    config_of_model = read_config(path)
    read_generation_config(path)
    dims = model_dims(config_of_model)
    kind = _checked_runner(run, dims, runner)
    if runner is None:
        dry_run(config_of_model, run)
    check_fit(checkpoint, config_of_model)
    _log_stages(run, dims)
    mesh = connect(run, {**fingerprint.of_config(config_of_model), **fingerprint.of_files(checkpoint)})
    dtype, device = torch_dtype(run.dtype), local_device()
    layers = stage_layers(dims.num_layers, run.parallel.pp_size, mesh.coordinate("pp"))
    held = run.topology.weights
    with with_memory_note(lambda: weights_note(weight_bytes(config_of_model, dtype, layers) // held, run, device)):
        # Loading waits for a disk, which may be slow, and for no peer: only what follows is watched. Stages read other
        # tensors, so that one may lack what others do not miss.
        with mesh["world"].together(process_watchdog.watch("waiting for all ranks to load")):
            loader = (
                LayerLoader(path, dtype, device) if kind is SequenceParallelRunner and run.weights != "whole" else None
            )
            if loader is not None:
                model = loader.model
            elif kind is TensorPipelineRunner:
                model = load_stage(path, dtype, device, layers)
            else:
                model = load_model(path, dtype, device)
        with process_watchdog.watch("building the engine"):
            if loader is not None:
                return Engine(SequenceParallelRunner(model, run, mesh, dims, device, loader.fill))
            return Engine(kind(model, run, mesh, dims, device))


def init_inference(
    model: PreTrainedModel,
    config: str | Path | dict[str, Any] | RunConfig | None = None,
    *,
    runner: type[ModelRunner] | None = None,
    **overrides: Any,
) -> Engine:
    """An engine around a transformers model that is already loaded, whole, on every rank.

    The model is changed in place: its attention is replaced and, for tensor x pipeline layouts, what belongs to other
    ranks is dropped. A dtype that is not given is the model's. Arguments and errors otherwise as ``from_pretrained``.
    """
    check_transformers()
    check_hostfile()
    run = RunConfig.load(config, **overrides)
    if "dtype" not in run.deepspeed:
        run = RunConfig.load(run, dtype=str(model.dtype))
    run = with_weights_degree(with_planned_degrees(run, model.config))
    dims = model_dims(model.config)
    kind = _checked_runner(run, dims, runner)
    _log_stages(run, dims)
    mesh = connect(run, {**fingerprint.of_config(model.config), **fingerprint.of_parameters(model)})
    with process_watchdog.watch("building the engine"):
        return build_engine(model, run, mesh, dims, local_device(), kind)


def _checked_runner(run: RunConfig, dims: ModelDims, given: type[ModelRunner] | None) -> type[ModelRunner]:
    """The layout that ``run`` asks for, or the one that is ``given``, after all rules that it must satisfy here."""
    whose = run.benchmark.implementation
    if given is None and whose != "ds_ring":
        raise ConfigError(
            f"implementation={whose} is another project's: launch/bench.py and launch/compare.py run it beside ours; "
            f"leave it out here"
        )
    check_layout(run, dims, world_size())
    kind = given or runner_of(run)
    kind.check(run, dims, local_device().type)
    return kind


def runner_of(run: RunConfig) -> type[ModelRunner]:
    """Our layout that ``run`` asks for."""
    topology = run.topology
    return TensorPipelineRunner if topology.tp * topology.pp > 1 else SequenceParallelRunner


def _log_stages(run: RunConfig, dims: ModelDims) -> None:
    """The pipeline's stages, where they are not of equally many layers."""
    pp = run.parallel.pp_size
    if dims.num_layers % pp:
        counts = [str(len(stage_layers(dims.num_layers, pp, stage))) for stage in range(pp)]
        log.info("pp_size=%d does not divide %d layers: stages of %s", pp, dims.num_layers, ", ".join(counts))


def with_planned_degrees(
    run: RunConfig, config: PretrainedConfig | None = None, *, generating: bool = False
) -> RunConfig:
    """``run`` with degrees for the ranks of this launch, where it says ``"parallel": "auto"``; says which and why.

    ``config``: the model's; None reads it from the checkpoint. ``generating``: see ``plan.with_planned_degrees``.
    """
    if not run.parallel.auto:
        return run
    found, reason = plan.with_planned_degrees(
        run, config or read_config(run.checkpoint), world_size(), card_of(local_device()), generating=generating
    )
    log.info("parallel=auto takes %s", reason)
    return found


def with_weights_degree(run: RunConfig) -> RunConfig:
    """``run`` with one copy of sharded weights on each host, where it says nothing else."""
    here, sp = ranks_of_host(), run.topology.sp
    if run.weights == "whole" or weights_degree_of(run.deepspeed) is not None or not here:
        return run
    return RunConfig.load(run, weights_degree=math.gcd(sp, here))


def build_engine(
    model: PreTrainedModel,
    run: RunConfig,
    mesh: Mesh,
    dims: ModelDims,
    device: torch.device,
    runner: type[ModelRunner] | None = None,
) -> Engine:
    """The engine that ``run`` asks for, over an existing mesh, around a whole ``model``."""
    own_configs(model)
    layers, dtype = stage_layers(dims.num_layers, run.parallel.pp_size, mesh.coordinate("pp")), torch_dtype(run.dtype)
    if len(layers) < dims.num_layers:
        # First: a device may have room for this stage alone.
        keep_stage(Decoder.of(model), layers)
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    with with_memory_note(lambda: weights_note(weights, run, device)):
        with float_buffers_kept(model):
            model = model.to(device=device, dtype=dtype).eval()
        return Engine((runner or runner_of(run))(model, run, mesh, dims, device))
