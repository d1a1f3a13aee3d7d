"""Connecting the ranks of a launch: device, process groups, what all must agree on, how each axis moves its bytes."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from datetime import timedelta
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from ds_ring.config import RunConfig
from ds_ring.engine.rendezvous import meet
from ds_ring.errors import ConfigError
from ds_ring.process import heartbeat
from ds_ring.process.hosts import rank_names
from ds_ring.process.network import MeetingPoint, one_host, ranks_of_host, use_interface
from ds_ring.process.parent_watch import end_what_is_stopped, end_with_launcher
from ds_ring.process.watchdog import process_watchdog
from ds_ring.transport.mesh import Mesh
from ds_ring.transport.process_group import ProcessGroupTransport
from ds_ring.transport.select import Location, select_transports, sharing_a_gpu
from ds_ring.utils.code_digest import code_digest
from ds_ring.utils.results import versions

log = logging.getLogger("ds_ring")

HOST_THREADS = 8
"""CPU threads of a rank that computes on a GPU, at most: on the host it handles small tensors only."""
GROUPS_WAIT_LONGER_S = 60
"""Process groups time out this much after the watchdog, which names the rank that is missing."""
LONGEST_WAIT_S = 20 * 24 * 3600
"""PyTorch's sockets count milliseconds in 32 bits."""


def connect(run: RunConfig, model: dict[str, Any] | None = None) -> Mesh:
    """Initialise ``deepspeed.comm`` and make the groups of every axis.

    All ranks must hold the same configuration, and the same model as far as ``model`` says (``hf.fingerprint``).
    From now on this process ends with its launcher, and when it waits too long for another rank.

    Raises:
        DisagreementError: on every rank alike, where they differ.
    """
    end_with_launcher()
    if os.environ.get("RANK", "0") != "0":
        disable_progress_bar()  # one bar for all ranks: rank 0's
    process_watchdog.timeout_s = run.ring.timeout_s
    end_what_is_stopped(run.ring.timeout_s)
    with process_watchdog.watch("connecting"):
        mesh = _connect(run, model or {})
    process_watchdog.activity = mesh.traffic
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
    _leave_out_a_deprecation()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    # Peers' memory is read by address; NVLink multicast is not used, and where it is broken, asking for it fails.
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    if sharing_a_gpu():
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    if not deepspeed.comm.is_initialized():
        timeout = _group_timeout(run.ring.timeout_s)
        # NCCL takes no two ranks on one GPU.
        backend = "nccl" if device.type == "cuda" and not sharing_a_gpu() else "gloo"
        _init_process_group(backend, device, timeout, run.ring.start_timeout_s)
        deepspeed.init_distributed(backend, verbose=False, timeout=timeout)
    # Before any group is made: ranks with different degrees would wait for different ranks.
    world = range(deepspeed.comm.get_world_size())
    everyone = ProcessGroupTransport(deepspeed.comm.get_world_group(), world, deepspeed.comm.get_rank())
    packages = {f"the version of {name}": value for name, value in versions().items()}
    if not one_host():
        everyone.place = socket.gethostname()
    everyone.agree(**{"the code of ds_ring": code_digest()}, **run.facts(), **packages, **model)
    if everyone.size > 1 and "MASTER_ADDR" in os.environ:
        address = MeetingPoint.of_launch().own_address()
        gather = everyone.all_gather_objects
        heartbeat.start(everyone.rank, everyone.size, rank_names(), address, run.ring.timeout_s, gather)
    locations = everyone.all_gather_objects(Location.of(device))
    if device.type == "cuda":
        _share_cores(sum(location.host == locations[everyone.rank].host for location in locations))
    ours = run.benchmark.implementation == "ds_ring"
    choice = select_transports(
        run.ring.transport if ours else "process_group", run.topology, locations, sharing_a_gpu()
    )
    if choice.describe():
        log.info("transport: %s", choice.describe())
    insist = run.ring.transport == "copy_engine"
    return Mesh.from_process_groups(run.topology, choice.pulled, device, insist, _messages(device))


def _leave_out_a_deprecation() -> None:
    """Of a function that DeepSpeed calls by its former name, as torch 2.13 would say on every rank."""
    warnings.filterwarnings("ignore", r"`torch\.distributed\.all_gather_into_tensor` is deprecated", FutureWarning)


def _init_process_group(backend: str, device: torch.device, timeout: timedelta, start_timeout_s: int) -> None:
    """PyTorch's default group, over one interface; DeepSpeed's own call would listen on all of them."""
    # NCCL connects at once with a device, as it does under DeepSpeed, and later groups take over what it has.
    options: dict[str, Any] = {"device_id": device} if backend == "nccl" and world_size() > 1 else {}
    point = MeetingPoint.of_launch()
    use_interface(point.own_address())
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent serves the store, and binds it
        torch.distributed.init_process_group(backend, timeout=timeout, **options)
        return
    rank, size = int(os.environ["RANK"]), world_size()
    store = meet(point, rank, size, start_timeout_s, timeout)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, **options)


def _messages(device: torch.device) -> type[ProcessGroupTransport]:
    """How process groups move tensors: NCCL takes no two ranks on one GPU, and gloo only host memory."""
    if device.type != "cuda" or not sharing_a_gpu():
        return ProcessGroupTransport
    from ds_ring.testing.host_staged import HostStagedTransport

    return HostStagedTransport


def _group_timeout(timeout_s: int) -> timedelta:
    """How long process groups wait. DeepSpeed's default of 10 minutes would end a run that may wait longer."""
    return timedelta(seconds=min(timeout_s + GROUPS_WAIT_LONGER_S, LONGEST_WAIT_S) if timeout_s else LONGEST_WAIT_S)


def _share_cores(ranks: int) -> None:
    """Give each rank of a host its share of the cores. PyTorch would start a thread for every core on every rank, and
    with more threads than cores an operation on 10,000 numbers takes tens of milliseconds."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(HOST_THREADS, len(os.sched_getaffinity(0)) // ranks)))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none. ``DS_ACCELERATOR=cpu`` asks for the CPU; with
    ``DS_RING_SHARE_GPU=1``, for tests, ranks beyond the number of GPUs share them.

    Raises:
        ConfigError: more ranks than GPUs; on all ranks of this host where the launcher says how many there are, else
            on those beyond.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if sharing_a_gpu():
        return torch.device("cuda", local_rank % gpus)
    ranks = max(local_rank + 1, ranks_of_host())
    if ranks > gpus:
        raise ConfigError(
            f"{ranks} ranks were launched on {socket.gethostname()}, which has {gpus} GPUs to give; launch with "
            f"--num_gpus {gpus} and lower the degrees, or see what CUDA_VISIBLE_DEVICES leaves out"
        )
    return torch.device("cuda", local_rank)
