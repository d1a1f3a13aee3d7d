"""Every implementation of attention on this machine, prepared for a case."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels import attention_flex
from benchmarks.kernels.attention_cases import Case, Inputs
from ds_ring.attention.backends import pytorch
from ds_ring.attention.backends.base import CUDNN, FLASH, Backend
from ds_ring.attention.backends.positions import attend_positions, uses_kernel
from ds_ring.attention.backends.select import select_backend
from ds_ring.attention.block import accumulate_, attend
from ds_ring.attention.merge import merge_plainly
from ds_ring.attention.segments import Segment, attend_ranges
from ds_ring.attention.spec import AttentionSpec, BlockSpec
from ds_ring.kernels import decode, triton_attention

Result = tuple[Tensor, Tensor | None]
Block = Callable[[Tensor, Tensor, Tensor, float, bool], Result]
"""(q, k, v, scale, causal) -> (out, lse or None); causal masks are aligned to the last query and the last key."""


@dataclass(frozen=True)
class Prepared:
    """An implementation with a case's tensors, compiled and tuned where it can be."""

    call: Callable[[], Result]
    detail: str = ""
    carries: bool = False
    """Whether the result includes the inputs' previous state."""


Prepare = Callable[[Inputs], Prepared]


def implementations(case: Case, device: torch.device) -> dict[str, Prepare]:
    """Implementations that can run the case, by name. Ours begin with ``ds_ring``. On a CPU: eager code and SDPA."""
    if case.kind == "carry":
        return {"ds_ring, no state": _ds_ring, "ds_ring": _ds_ring_carrying, "ds_ring + merge": _ds_ring_merging}
    if case.kind == "back-ends":
        return {f"ds_ring {backend.name}": partial(_by_backend, backend) for backend in (CUDNN, FLASH)}
    found: dict[str, Prepare] = {}
    # scaled_dot_product_attention aligns its causal mask to the first key, ours to the last. On squares both agree.
    aligned_alike = not case.causal or (case.ranks == 1 and case.seq_q == case.seq_k)
    if device.type == "cuda":
        flash_fits = case.head_dim <= pytorch.FLASH_MAX_HEAD_DIM
        found["sdpa memory_efficient"] = partial(_by_blocks, _returning_lse(pytorch.memory_efficient))
        if flash_fits:
            found["sdpa flash"] = partial(_by_blocks, _returning_lse(pytorch.flash))
        if flash_fits and aligned_alike:
            found["sdpa cudnn"] = partial(_by_blocks, _sdpa(SDPBackend.CUDNN_ATTENTION))
        found["flex"] = _flex
        if flash_fits:
            found |= _flash_attn_packages()
    elif aligned_alike:
        found["sdpa math"] = partial(_by_blocks, _sdpa(SDPBackend.MATH))
    if case.kind == "decode":
        found |= {"ds_ring": _by_positions, "ds_ring block": _ds_ring}
        if device.type == "cuda" and decode.unavailable(device) is None:
            found |= _decode_tiles(case)
    else:
        found["ds_ring"] = _ds_ring
    if triton_attention.unavailable(device) is None:
        found["ds_ring triton"] = partial(_by_blocks, _triton)
    return found


def _by_blocks(block: Block, inputs: Inputs) -> Prepared:
    """One call for each range of queries. K and V are in the order of the sequence; in a ring that takes copies."""
    case, q, k, v = inputs.case, inputs.q, inputs.k, inputs.v
    if case.ranks == 1:
        return Prepared(lambda: block(q, k, v, case.scale, case.causal))

    def call() -> Result:
        results = []
        done = 0
        for own in case.ranges:
            own_q = q[:, done : done + own.length]
            results.append(block(own_q, k[:, : own.stop], v[:, : own.stop], case.scale, True))
            done += own.length
        lses = [lse for _, lse in results if lse is not None]
        return torch.cat([out for out, _ in results], dim=1), torch.cat(lses, dim=2) if lses else None

    return Prepared(call, f"{len(case.ranges)} calls, K and V in order")


def _returning_lse(kernel: Any) -> Block:
    return lambda q, k, v, scale, causal: kernel(q, k, v, scale=scale, causal=causal)


def _sdpa(backend: SDPBackend) -> Block:
    def block(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Result:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
        return out.transpose(1, 2), None

    return block


def _flex(inputs: Inputs) -> Prepared:
    call, options = attention_flex.tuned(inputs)
    detail = ", ".join(f"{name.removeprefix('num_')} {value}" for name, value in options.items())
    return Prepared(call, detail or "default options")


def _flash_attn_packages() -> dict[str, Prepare]:
    found: dict[str, Prepare] = {}
    if package := _module("flash_attn"):

        def two(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Result:
            out, lse, _ = package.flash_attn_func(
                q, k, v, softmax_scale=scale, causal=causal, return_attn_probs=True
            )  # the flag's name is historical: outside training it returns the lse and an empty tensor
            return out, lse

        found["flash-attn"] = partial(_by_blocks, two)
    if interface := _module("flash_attn_interface"):

        def three(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Result:
            result = interface.flash_attn_func(q, k, v, softmax_scale=scale, causal=causal)
            return (result[0], result[1]) if isinstance(result, tuple) else (result, None)  # differs by release

        found["flash-attn 3"] = partial(_by_blocks, three)
    return found


def _triton(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Result:
    offset = k.shape[1] - q.shape[1]
    return triton_attention.attention(q, k, v, scale=scale, causal=causal, q_offset=offset, k_offset=0)


def _ds_ring(inputs: Inputs) -> Prepared:
    """What an engine would call: ``block.attend``, or for a rank of a ring ``segments.attend_ranges``."""
    case, q, k, v = inputs.case, inputs.q, inputs.k, inputs.v
    spec = AttentionSpec(case.scale)
    if case.ranks > 1:
        keys = [Segment(a, k[:, a:b], v[:, a:b]) for a, b in pairwise(case.edges)]
        detail = f"{_backends(inputs)}, {len(keys)} segments"
        return Prepared(lambda: (attend_ranges(q, case.ranges, keys, spec), None), detail)
    offset = case.ranges[0].start
    return Prepared(lambda: attend(q, k, v, spec=spec, causal=case.causal, q_offset=offset), _backends(inputs))


def _by_backend(backend: Backend, inputs: Inputs) -> Prepared:
    case, q, k, v = inputs.case, inputs.q, inputs.k, inputs.v
    block = BlockSpec(AttentionSpec(case.scale), case.causal, case.ranges[0].start)
    return Prepared(lambda: backend.attend(q, k, v, block, q.dtype))


def _positions(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys, as in a full cache: the last query is at the last key."""
    case = inputs.case
    everywhere = torch.arange(case.seq_k, device=inputs.q.device, dtype=torch.int32).repeat(case.batch, 1)
    return everywhere[:, case.ranges[0].start :], everywhere


def _by_positions(inputs: Inputs) -> Prepared:
    """A decode step as an engine would run it."""
    q, k, v = inputs.q, inputs.k, inputs.v
    q_positions, k_positions = _positions(inputs)
    spec = AttentionSpec(inputs.case.scale)
    return Prepared(
        lambda: attend_positions(q, k, v, q_positions_BL=q_positions, k_positions_BS=k_positions, spec=spec),
        "the decode kernel" if uses_kernel(q, spec) else "plain PyTorch",
    )


def _decode_tiles(case: Case) -> dict[str, Prepare]:
    """The decode kernel with each of its tile sizes, its default first."""
    from ds_ring.kernels import decode_kernel

    tiles = decode_kernel.tiles(case.head_dim, case.seq_q * case.heads // case.kv_heads, torch.float16)
    return {f"ds_ring {m}x{n} {w}w {s}s": partial(_with_tile, (m, n, w, s)) for m, n, w, s in tiles}


def _with_tile(tile: tuple[int, int, int, int], inputs: Inputs) -> Prepared:
    from ds_ring.kernels import decode_kernel

    case, q, k, v = inputs.case, inputs.q, inputs.k, inputs.v
    positions = _positions(inputs)

    def call() -> Result:
        out, lse = torch.empty_like(q), q.new_empty((case.batch, case.heads, case.seq_q), dtype=torch.float32)
        decode_kernel.launch(
            q, k, v, *positions, out, lse, scale=case.scale, window=None, softcap=None, tile=tile
        )  # fmt: skip
        return out, lse

    return Prepared(call, "rows x keys, warps, stages")


def _ds_ring_carrying(inputs: Inputs) -> Prepared:
    """A step of a ring: the block is accumulated into the state, in place, so every call changes the state."""
    assert inputs.state is not None
    case, q, k, v = inputs.case, inputs.q, inputs.k, inputs.v
    spec, offset = AttentionSpec(case.scale), case.ranges[0].start
    out, lse = (t.clone() for t in inputs.state)

    def call() -> Result:
        accumulate_(out, lse, q, k, v, spec=spec, causal=case.causal, q_offset=offset)
        return out, lse

    return Prepared(call, f"{_backends(inputs)}, state in place", carries=True)


def _ds_ring_merging(inputs: Inputs) -> Prepared:
    """The same in two steps: the block without the state, and a compiled merge into it."""
    assert inputs.state is not None
    block = _ds_ring(inputs)
    out, lse = (t.clone() for t in inputs.state)
    merge = torch.compile(merge_plainly, dynamic=False)

    def call() -> Result:
        block_out, block_lse = block.call()
        assert block_lse is not None
        merge(out, lse, (out, lse), (block_out, block_lse))
        return out, lse

    return Prepared(call, f"{block.detail}, compiled merge", carries=True)


def _backends(inputs: Inputs) -> str:
    case, spec = inputs.case, AttentionSpec(inputs.case.scale)
    backends = [
        select_backend(inputs.q[:, : r.length], r.stop, BlockSpec(spec, case.causal, r.start)) for r in case.ranges
    ]
    return ", ".join(dict.fromkeys(backend.name for backend in backends))


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
