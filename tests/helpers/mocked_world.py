"""A world of many ranks in one process, one thread a rank, running the real engines.

Real: the transformers model and its weights, ``deepspeed.init_inference`` with AutoTP, ``deepspeed.comm``, the mesh,
the engines, the attention, every shard and every number.

Mocked: the launcher and the wire. Sequence-parallel layouts meet over ``ThreadedTransport``. Layouts that need
``deepspeed.comm`` (AutoTP's all-reduces, pipeline hand-over) run on the threads of ``process_group_world.py``.

Not shown by this world: speed, CUDA streams, a rank that dies, and the all-reduces that c10d's dispatcher would see.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from ds_ring.api import build_engine
from ds_ring.config import RunConfig
from ds_ring.engine.engine import Engine
from ds_ring.hf.dims import model_dims
from ds_ring.planning.validation import check_run
from ds_ring.transport.mesh import Mesh
from tests.helpers.peer_threads import copy_engine_mesh
from tests.helpers.process_group_world import ProcessGroupWorld
from tests.helpers.worlds import in_mesh, mesh_of

T = TypeVar("T")
Wire = Literal["threads", "process_groups", "copy_engine"]


def serve(
    model: PreTrainedModel,
    work: Callable[[Engine], T],
    *,
    wire: Wire | None = None,
    dtype: str = "fp32",
    **options: Any,
) -> list[T]:
    """``work(engine)`` on every rank of the world that ``options`` describe, each with its own copy of ``model``.

    Args:
        model: a whole model; left as it is.
        wire: what layouts run on. Those that share layers need process groups, pipelines unless it says copy_engine.
        options: degrees and workload, as ``RunConfig.load`` takes them.

    Returns:
        Results in rank order; the first error of any rank is raised.
    """
    run = RunConfig.load({"dtype": dtype}, **options)
    size, shape = run.topology.world_size, model_dims(model.config)
    check_run(run, shape, size)
    copies = [copy.deepcopy(model) for _ in range(size)]

    def on_rank(mesh: Mesh) -> T:
        return work(build_engine(copies[mesh.rank], run, mesh, shape, torch.device("cpu")))

    with one_process():
        if wire == "process_groups" or (run.topology.tp * run.topology.pp > 1 and wire != "copy_engine"):
            return ProcessGroupWorld(size).run(lambda rank: on_rank(Mesh.from_process_groups(run.topology)))
        return in_mesh(run.topology, on_rank, make_mesh=copy_engine_mesh() if wire == "copy_engine" else mesh_of)


def outcome(work: Callable[[], object]) -> Exception | None:
    """What ``work`` raises on this rank, told instead of raised: it does not disturb ranks that raise the same."""
    try:
        work()
    except Exception as error:
        return error
    return None


def relative_error(got: Tensor, want: Tensor) -> float:
    """The worst token's ``|got - want| / |want|``, in the 2-norm over the vocabulary."""
    difference, scale = (got.double() - want.double()).norm(dim=-1), want.double().norm(dim=-1)
    return (difference / scale).max().item()


@contextmanager
def one_process() -> Iterator[None]:
    """What ranks share as threads: DeepSpeed's accelerator, here the CPU, also on a machine with GPUs, with fp16 let
    through as ``ds_ring.engine.connect`` does; PyTorch's own threads, of which 16 ranks want no more; and stdout."""
    accelerator, threads, stdout = get_accelerator(), torch.get_num_threads(), sys.stdout
    cpu = CPU_Accelerator()
    cpu.is_fp16_supported = lambda: True
    set_accelerator(cpu)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    try:
        yield
    finally:
        set_accelerator(accelerator)
        torch.set_num_threads(threads)
        # Ranks redirect standard output while DeepSpeed prints; as threads they may undo that in any order.
        sys.stdout = stdout
