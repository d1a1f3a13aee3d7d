"""Attention over whole sequences, cut over the ranks of a world of threads, and held against fp64."""

# Shapes: B batch, L tokens of the sequence, T tokens of one rank, H query heads, K key/value heads, D head_dim.
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ds_ring.attention.hybrid import sequence_parallel_attention
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.config import RingVariant
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.parallel.topology import Topology
from ds_ring.transport.base import Traffic, Transport
from ds_ring.transport.mesh import Mesh
from tests.helpers.worlds import MakeMesh, in_mesh, mesh_of

GARBAGE = 1e3
"""What padding holds, so that a token that looks at it shows."""


@dataclass(frozen=True)
class Problem:
    """Random q, k and v of a whole sequence."""

    length: int
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 4
    batch: int = 1
    window: int | None = None
    softcap: float | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float32
    with_sinks: bool = False

    @property
    def sinks_H(self) -> Tensor | None:
        if not self.with_sinks:
            return None
        return 2 * torch.randn(self.heads, generator=torch.Generator().manual_seed(self.seed + 1)).to(self.dtype)

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.head_dim**-0.5, self.window, self.softcap)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        q, k, v = (
            torch.randn(self.batch, self.length, heads, self.head_dim, generator=generator).to(self.dtype)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        return q, k, v

    def error(self, out_BLHD: Tensor) -> float:
        """Relative error against fp64 attention over the whole sequence; NaN where the output is."""
        want = _expected(self)
        assert out_BLHD.shape == want.shape
        return float((out_BLHD.double() - want).norm() / want.norm())


@cache
def _expected(problem: Problem) -> Tensor:
    out, lse = reference_attention(*problem.tensors(), spec=problem.spec)
    return out if problem.sinks_H is None else sink_reference(out, lse, problem.sinks_H)


def sink_reference(out_BLHD: Tensor, lse_BHL: Tensor, sinks_H: Tensor) -> Tensor:
    """fp64 attention with sinks: the share of a softmax over (all keys, sink) that goes to the keys."""
    columns = torch.stack((lse_BHL, sinks_H.double()[None, :, None].expand_as(lse_BHL)), -1)
    return out_BLHD * torch.softmax(columns, -1)[..., 0].transpose(1, 2)[..., None]


@dataclass(frozen=True)
class Result:
    """Attention of the whole sequence in natural order, without padding, and what every rank sent for it."""

    out_BLHD: Tensor
    traffic: list[Traffic]


def cut(x_BLHD: Tensor, layout: SequenceLayout, ring_rank: int, ulysses_rank: int) -> Tensor:
    """One rank's tokens."""
    padding = x_BLHD.new_full((x_BLHD.shape[0], layout.padded_length - layout.length, *x_BLHD.shape[2:]), GARBAGE)
    return torch.cat((x_BLHD, padding), 1)[:, layout.positions(ring_rank, ulysses_rank)]


def put_together(parts_BTHD: Sequence[Tensor], layout: SequenceLayout) -> Tensor:
    """All ranks' tokens, ring-major, in natural order and without padding."""
    rows = torch.cat(list(parts_BTHD), 1)
    out = torch.full_like(rows, torch.nan)
    out[:, [p for rank in range(layout.ring_degree) for p in layout.slice_positions(rank)]] = rows
    return out[:, : layout.length]


def run_attention(
    problem: Problem,
    layout: SequenceLayout,
    *,
    variant: RingVariant = "auto",
    gather_limit_bytes: int = 2 << 30,
    cut_by: SequenceLayout | None = None,
    put_together_by: SequenceLayout | None = None,
    view: Callable[[Tensor], Tensor] = lambda x_BTHD: x_BTHD,
    wrap: Callable[[Transport], Transport] = lambda transport: transport,
    make_mesh: MakeMesh = mesh_of,
    repeats: int = 1,
) -> Result:
    """Sequence-parallel attention of ``problem`` in a world of ``layout``.

    ``cut_by`` and ``put_together_by`` are layouts that wrongly replace ``layout`` on the way in or out; ``view`` gives
    every rank's tensors other strides; ``wrap`` makes what moves bytes of the mesh's transports; ``repeats`` runs it
    so many times over, after a first time on other numbers.
    """
    tensors = problem.tensors()

    def work(mesh: Mesh) -> tuple[Tensor, Traffic]:
        ring, ulysses = wrap(mesh["ring"]), wrap(mesh["ulysses"])
        place = mesh.coordinate("ring"), mesh.coordinate("ulysses")
        q, k, v = (view(cut(x, cut_by or layout, *place)) for x in tensors)
        for again in range(repeats):
            mesh.traffic.bytes_by_op.clear()
            sign = 1.0 if again == repeats - 1 else -1.0 - again
            out = sequence_parallel_attention(
                sign * q, sign * k, sign * v, layout=layout, spec=problem.spec,
                ring=ring, ulysses=ulysses,
                sinks_H=problem.sinks_H, variant=variant, gather_limit_bytes=gather_limit_bytes,
            )  # fmt: skip
        return out, mesh.traffic

    topology = Topology(ring=layout.ring_degree, ulysses=layout.ulysses_degree)
    outs, traffic = zip(*in_mesh(topology, work, make_mesh=make_mesh), strict=True)
    return Result(put_together(outs, put_together_by or layout), list(traffic))
