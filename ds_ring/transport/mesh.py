"""One rank's view of the world: its coordinates and a transport along every axis."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch

from ds_ring.errors import TransportError, reason_of
from ds_ring.parallel.topology import Axis, Topology
from ds_ring.transport.base import Traffic, Transport
from ds_ring.transport.select import PULLED_AXES
from ds_ring.transport.solo import SoloTransport

if TYPE_CHECKING:
    from ds_ring.transport.process_group import ProcessGroupTransport

log = logging.getLogger("ds_ring")

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Mesh:
    """Groups are arguments, never globals: two models in one process hold two meshes and do not meet."""

    topology: Topology
    rank: int
    transports: dict[Axis, Transport]
    """Looked up whenever something moves, so that another may take the place of one for a while."""

    def __getitem__(self, axis: Axis) -> Transport:
        return self.transports[axis]

    def coordinate(self, axis: Axis) -> int:
        return self.topology.coordinates(self.rank)[axis]

    @property
    def traffic(self) -> Traffic:
        """One account for all axes, so that operations stay in the order in which they happened."""
        return self.transports["world"].traffic

    @classmethod
    def build(cls, topology: Topology, rank: int, connect: Callable[[Axis, tuple[int, ...]], Transport | None]) -> Mesh:
        """``connect(axis, ranks)`` is called for every group of every axis, in the same order on all ranks, and
        returns this rank's transport where it belongs to the group. Groups of one need no connection."""
        transports: dict[Axis, Transport] = {}
        for axis in get_args(Axis):
            for ranks in topology.groups(axis):
                if len(ranks) == 1:
                    transport: Transport | None = SoloTransport()
                else:
                    transport = connect(axis, ranks)
                if rank in ranks:
                    assert transport is not None
                    transports[axis] = transport
        for transport in transports.values():
            transport.traffic = transports["world"].traffic
        return cls(topology, rank, transports)

    @property
    def transport_names(self) -> str:
        """What moves K/V, heads and hidden states, e.g. "ring: copy engine"; empty where nothing of these moves."""
        return ", ".join(f"{axis}: {self[axis].name}" for axis in PULLED_AXES if self[axis].size > 1)

    @property
    def shared_bytes(self) -> int:
        """Of this rank's memory, what peers can read."""
        return sum(self[axis].shared_bytes for axis in PULLED_AXES)

    @property
    def overlaps(self) -> bool:
        """Whether any axis moves what micro-batches wait for at (almost) no cost to the kernels beside it."""
        return any(self[axis].overlaps for axis in PULLED_AXES if axis != "weights")

    @classmethod
    def from_process_groups(
        cls,
        topology: Topology,
        pulled: frozenset[Axis] = frozenset(),
        device: torch.device = CPU,
        insist: bool = False,
        messages: type[ProcessGroupTransport] | None = None,
    ) -> Mesh:
        """Process groups of ``deepspeed.comm``, which must be initialised; axes in ``pulled`` use copy engines,
        all else ``messages``.

        Where copy engines fail their self-test on any rank, process groups take over on all, with a warning.

        Raises:
            TransportError: on every rank, if they fail and ``insist`` is set.
        """
        from deepspeed import comm as dist

        from ds_ring.transport.process_group import ProcessGroupTransport

        rank = dist.get_rank()
        over = messages or ProcessGroupTransport
        # Axes that join the same ranks share a group: each costs GPU memory once it has been used.
        groups: dict[tuple[int, ...], Any] = {tuple(range(topology.world_size)): dist.get_world_group()}

        def connect(axis: Axis, ranks: tuple[int, ...]) -> Transport | None:
            if ranks not in groups:
                groups[ranks] = dist.new_group(list(ranks))
            if rank not in ranks:
                return None
            control = over(groups[ranks], ranks, ranks.index(rank))
            return _pulling(control, device) if axis in pulled else control

        mesh = cls.build(topology, rank, connect)
        for axis in get_args(Axis):
            # NCCL sets a group up at its first call, and hangs if that is a message between only some of its ranks.
            mesh[axis].barrier()
        reason = mesh._failed_self_test(device)
        if reason is None:
            return mesh
        if insist:
            raise TransportError(f"transport=copy_engine does not work here: {reason}")
        if rank == 0:
            log.warning("K/V, heads and hidden states go by process groups, not by copy engine: %s", reason)
        pulled = frozenset()
        return cls.build(topology, rank, connect)

    def _failed_self_test(self, device: torch.device) -> str | None:
        """Why the transports of an axis cannot be relied on; None on every rank, or on none."""
        for axis in PULLED_AXES:
            try:
                # Of all groups together: those of the next axis join ranks of this axis's different ones.
                with self["world"].together():
                    self[axis].self_test(device)
            except Exception as error:  # a driver or a PyTorch that cannot, in whatever way, or wrong numbers
                return f"{axis}: {reason_of(error)}"
        return None


def _pulling(control: ProcessGroupTransport, device: torch.device) -> Transport:
    from ds_ring.transport.copy_engine import CopyEngineTransport
    from ds_ring.transport.cuda_memory import CudaDevice

    return CopyEngineTransport(control, CudaDevice(control, device))
