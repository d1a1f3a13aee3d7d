"""The two doors: ``from_pretrained`` and ``init_inference``, from a configuration to an engine.

Each checks, then connects the ranks of this launch, then loads or takes the weights.
"""

from __future__ import annotations

import logging
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ds_ring.config import RunConfig
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
from ds_ring.hf.dims import model_dims, read_config
from ds_ring.hf.loading import load_model, load_stage, weight_bytes
from ds_ring.hf.stage import keep_stage
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.degrees import stage_layers
from ds_ring.planning import plan
from ds_ring.planning.cards import card_of
from ds_ring.planning.validation import check_layout
from ds_ring.process.hostfile import check_hostfile
from ds_ring.process.parent_watch import end_with_launcher
from ds_ring.process.watchdog import outside
from ds_ring.transport.mesh import Mesh
from ds_ring.transport.process_group import ProcessGroupTransport
from ds_ring.transport.select import Location, select_transports, sharing_a_gpu
from ds_ring.utils.results import versions

log = logging.getLogger("ds_ring")

HOST_THREADS = 8
"""Of a rank that computes on a GPU, at most: its host's part is small tensors."""
GROUPS_WAIT_LONGER_S = 60
LONGEST_WAIT_S = 20 * 24 * 3600
"""PyTorch's sockets count milliseconds in 32 bits."""


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
    check_hostfile()
    run = RunConfig.load(config, **{"model": str(path) if path else None, **overrides})
    path = run.checkpoint
    checkpoint = Checkpoint.open(path)
    run = with_planned_degrees(run)
    config_of_model = read_config(path)
    dims = model_dims(config_of_model)
    kind = _checked_runner(run, dims, runner)
    if runner is None:
        dry_run(config_of_model, run)
    _log_stages(run, dims)
    mesh = connect(run, {**fingerprint.of_config(config_of_model), **fingerprint.of_files(checkpoint)})
    dtype, device = torch_dtype(run.dtype), local_device()
    layers = stage_layers(dims.num_layers, run.parallel.pp_size, mesh.coordinate("pp"))
    with with_memory_note(lambda: weights_note(weight_bytes(config_of_model, dtype, layers), run, device)):
        # Loading waits for a disk, which may be slow, and for no peer: only what follows is watched. Stages read other
        # tensors, so that one may lack what others do not miss.
        with mesh["world"].together(outside.over("waiting for all ranks to load")):
            if kind is TensorPipelineRunner:
                model = load_stage(path, dtype, device, layers)
            else:
                model = load_model(path, dtype, device)
        with outside.over("building the engine"):
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
    check_hostfile()
    run = RunConfig.load(config, **overrides)
    if "dtype" not in run.deepspeed:
        run = RunConfig.load(run, dtype=str(model.dtype))
    run = with_planned_degrees(run, model.config)
    dims = model_dims(model.config)
    kind = _checked_runner(run, dims, runner)
    _log_stages(run, dims)
    mesh = connect(run, {**fingerprint.of_config(model.config), **fingerprint.of_parameters(model)})
    with outside.over("building the engine"):
        return build_engine(model, run, mesh, dims, local_device(), kind)


def _checked_runner(run: RunConfig, dims: ModelDims, given: type[ModelRunner] | None) -> type[ModelRunner]:
    """The layout that ``run`` asks for, or the one that is ``given``, after all rules that it must satisfy here."""
    whose = run.parallel.implementation
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
        log.info("%s", f"pp_size={pp} does not divide {dims.num_layers} layers: stages of {', '.join(counts)}")


def with_planned_degrees(run: RunConfig, config: PretrainedConfig | None = None) -> RunConfig:
    """``run`` with degrees for the ranks of this launch, where it says ``"parallel": "auto"``; says which and why.

    ``config``: the model's; None reads it from the checkpoint.
    """
    if not run.parallel.auto:
        return run
    found, reason = plan.with_planned_degrees(
        run, config or read_config(run.checkpoint), world_size(), card_of(local_device())
    )
    log.info("%s", f"parallel=auto takes {reason}")
    return found


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


def connect(run: RunConfig, model: dict[str, Any] | None = None) -> Mesh:
    """Initialise ``deepspeed.comm`` and make the groups of every axis.

    All ranks must hold the same configuration, and the same model as far as ``model`` says (see ``hf.identity``). From
    now on this process ends with its launcher, and when it waits for a peer that does not come.
    """
    end_with_launcher()
    outside.timeout_s = run.ring.timeout_s
    with outside.over("connecting"):
        mesh = _connect(run, model or {})
    outside.activity = mesh.traffic
    return mesh


def _connect(run: RunConfig, model: dict[str, Any]) -> Mesh:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # DeepSpeed's shared-memory all-reduce for CPUs ignores its group: wrong or hanging inside sub-groups.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # It refuses fp16 on CPUs without the instructions; PyTorch computes it all the same, only slowly.
        get_accelerator().is_fp16_supported = lambda: True
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    # Peers' memory is read by address; NVLink multicast is not used, and where it is broken, asking for it fails.
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    if sharing_a_gpu():
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    if not deepspeed.comm.is_initialized():
        timeout = _group_timeout(run.ring.timeout_s)
        if sharing_a_gpu():
            # NCCL takes no two ranks on one GPU, and DeepSpeed would give each rank a GPU of its own.
            torch.distributed.init_process_group("gloo", timeout=timeout)
        backend = "nccl" if device.type == "cuda" and not sharing_a_gpu() else "gloo"
        deepspeed.init_distributed(backend, verbose=False, timeout=timeout)
    # Before any group is made: ranks that were told different degrees would wait for different peers.
    world = range(deepspeed.comm.get_world_size())
    everyone = ProcessGroupTransport(deepspeed.comm.get_world_group(), world, deepspeed.comm.get_rank())
    packages = {f"the version of {name}": value for name, value in versions().items()}
    everyone.agree(**run.facts(), **packages, **model)
    locations = everyone.all_gather_objects(Location.of(device))
    if device.type == "cuda":
        _share_cores(sum(location.host == locations[everyone.rank].host for location in locations))
    ours = run.parallel.implementation == "ds_ring"
    choice = select_transports(
        run.ring.transport if ours else "process_group", run.topology, locations, sharing_a_gpu()
    )
    if choice.describe():
        log.info("%s", f"transport: {choice.describe()}")
    insist = run.ring.transport == "copy_engine"
    return Mesh.from_process_groups(run.topology, choice.pulled, device, insist, _messages(device))


def _messages(device: torch.device) -> type[ProcessGroupTransport]:
    """How process groups move tensors: NCCL takes no two ranks on one GPU, and gloo only host memory."""
    if device.type != "cuda" or not sharing_a_gpu():
        return ProcessGroupTransport
    from ds_ring.testing.host_staged import HostStagedTransport

    return HostStagedTransport


def _group_timeout(timeout_s: int) -> timedelta:
    """For how long process groups wait: longer than the watch, which names who is missing; DeepSpeed's 10 minutes would
    end a run that may wait for longer."""
    return timedelta(seconds=min(timeout_s + GROUPS_WAIT_LONGER_S, LONGEST_WAIT_S) if timeout_s else LONGEST_WAIT_S)


def _share_cores(ranks: int) -> None:
    """Give each of a host's ranks its share of the cores. PyTorch would start a thread for every core on every rank,
    and teams that wait for each other take tens of milliseconds over an operation on 10,000 numbers."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(HOST_THREADS, len(os.sched_getaffinity(0)) // ranks)))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none. ``DS_ACCELERATOR=cpu`` asks for the CPU; with
    ``DS_RING_SHARE_GPU=1``, for tests, ranks beyond the number of GPUs share them.

    Raises:
        ConfigError: more ranks than GPUs; under DeepSpeed's launcher on all ranks of this host, else on those beyond.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if sharing_a_gpu():
        return torch.device("cuda", local_rank % gpus)
    ranks = max(local_rank + 1, int(os.environ.get("LOCAL_SIZE", "1")))
    if ranks > gpus:
        raise ConfigError(
            f"{ranks} ranks were launched on {socket.gethostname()}, which has {gpus} GPUs to give; launch with "
            f"--num_gpus {gpus} and lower the degrees, or see what CUDA_VISIBLE_DEVICES leaves out"
        )
    return torch.device("cuda", local_rank)
