"""What can compute one block of attention, behind one interface: its result alone, or folded into a running one."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from ds_ring.attention.backends import eager, pytorch
from ds_ring.attention.merge import Partial, merge_, merge_into
from ds_ring.attention.spec import BlockSpec
from ds_ring.kernels import attention512, jit, triton_attention


class Backend(ABC):
    name: str

    def __repr__(self) -> str:
        return self.name

    def unusable(self, device: torch.device) -> str | None:
        """Why it cannot run on ``device``; None where it can."""
        return None

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec, out_dtype: torch.dtype) -> Partial:
        """q [B, L, H, D], k and v [B, S, K, D], any strides with a contiguous last dimension."""

    def attend_into_(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> Tensor:
        """The result in ``out``, of any strides with a contiguous last dimension; lse."""
        found, lse = self.attend(q, k, v, block, out.dtype)
        out.copy_(found)
        return lse

    def accumulate_(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> None:
        """Fold the block into the running ``out`` and ``lse``, both fp32 and of any strides, in place."""
        merge_(out, lse, *self.attend(q, k, v, block, torch.float32))


class _Eager(Backend):
    name = "plain PyTorch"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec, out_dtype: torch.dtype) -> Partial:
        return eager.attention(
            q, k, v, spec=block.attention, causal=block.causal, shift=block.shift, out_dtype=out_dtype
        )


class _Triton(Backend):
    """Our Triton kernel: windows, softcap, any head size; the running result goes through the kernel."""

    name = "our Triton kernel"

    def unusable(self, device: torch.device) -> str | None:
        return triton_attention.unavailable(device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec, out_dtype: torch.dtype) -> Partial:
        return self._run(q, k, v, block, None, out_dtype)

    def accumulate_(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> None:
        new_out, new_lse = self._run(q, k, v, block, (out, lse), torch.float32)
        out.copy_(new_out)
        lse.copy_(new_lse)

    @staticmethod
    def _run(
        q: Tensor, k: Tensor, v: Tensor, block: BlockSpec, previous: Partial | None, out_dtype: torch.dtype
    ) -> Partial:
        spec = block.attention
        return triton_attention.attention(
            q, k, v, scale=spec.scale, causal=block.causal, q_offset=block.shift, k_offset=0,
            window=spec.window if block.causal else None, softcap=spec.softcap, previous=previous, out_dtype=out_dtype,
        )  # fmt: skip


class _Attention512(Backend):
    """Our CUDA kernel for head_dim 512; it reads and writes a running result where it lies."""

    name = "attention512"

    def unusable(self, device: torch.device) -> str | None:
        return jit.unavailable(device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec, out_dtype: torch.dtype) -> Partial:
        out, lse = attention512.attention512(*self._call(q, k, v, block), out_dtype=out_dtype)
        return out, lse

    def attend_into_(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> Tensor:
        return attention512.into_(out, *self._call(q, k, v, block))

    def accumulate_(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> None:
        attention512.accumulate_(out, lse, *self._call(q, k, v, block))

    @staticmethod
    def _call(q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> attention512.Call:
        return q, [k], [v], [0], [0, q.shape[1], block.shift], block.causal, block.attention.scale


class AlignedKernel(Protocol):
    """A causal mask is aligned to the last query and the last key: query i sees keys 0 .. S - L + i.

    Blocks in which a query sees nothing are not asked for.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> Partial: ...


class Aligned(Backend):
    """A kernel that knows no offsets, windows or softcap, and gives q's dtype."""

    def __init__(self, name: str, kernel: AlignedKernel) -> None:
        self.name, self.kernel = name, kernel

    def attend(self, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec, out_dtype: torch.dtype) -> Partial:
        out, lse = self._reduced(q, k, v, block)
        return out.to(out_dtype), lse

    def attend_into_(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> Tensor:
        return self._reduced(q, k, v, block, out)[1]

    def accumulate_(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> None:
        merge_(out, lse, *self._reduced(q, k, v, block))

    def _reduced(self, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec, out: Tensor | None = None) -> Partial:
        """Any offset reduced to the kernel's one alignment; the result in ``out``, where there is one."""
        assert block.attention.plain
        scale, shift = block.attention.scale, block.shift
        n_queries, n_keys = q.shape[1], k.shape[1]
        if not block.causal or shift >= n_keys:  # every query sees every key
            return self._called(q, k, v, scale, False, out)
        blind = min(n_queries, max(0, -shift))  # leading queries that see nothing
        sighted = min(n_queries, max(blind, n_keys - shift))  # from here on, queries see every key
        seen = sighted + shift
        if blind == 0 and sighted == n_queries:
            return self._called(q, k[:, :seen], v[:, :seen], scale, True, out)
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        out[:, :blind] = 0
        lse = q.new_full((q.shape[0], q.shape[2], n_queries), -torch.inf, dtype=torch.float32)
        pieces = [(slice(blind, sighted), slice(seen), True), (slice(sighted, n_queries), slice(n_keys), False)]
        for rows, keys, causal in pieces:
            if rows.start < rows.stop:
                _, lse[:, :, rows] = self._called(q[:, rows], k[:, keys], v[:, keys], scale, causal, out[:, rows])
        return out, lse

    def _called(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, out: Tensor | None) -> Partial:
        found, lse = self.kernel(q, k, v, scale=scale, causal=causal)
        return (found if out is None else out.copy_(found)), lse


class AlignedToFirst(Aligned):
    """Of a kernel whose causal mask is aligned to the first key: query i sees keys 0 .. i. A causal block with more
    keys than queries goes in two calls, the keys that all queries see and the square behind them."""

    def _called(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, out: Tensor | None) -> Partial:
        ahead = k.shape[1] - q.shape[1]
        if not causal or ahead == 0:
            return super()._called(q, k, v, scale, causal, out)
        before, lse = self.kernel(q, k[:, :ahead], v[:, :ahead], scale=scale, causal=False)
        square = self.kernel(q, k[:, ahead:], v[:, ahead:], scale=scale, causal=True)
        out = before if out is None else out
        merge_into(out, lse, (before, lse), square)
        return out, lse


EAGER: Backend = _Eager()
TRITON: Backend = _Triton()
ATTENTION512: Backend = _Attention512()
FLASH: Backend = Aligned("FlashAttention-2", pytorch.flash)
CUDNN: Backend = AlignedToFirst("cuDNN", pytorch.cudnn)
MEMORY_EFFICIENT: Backend = Aligned("PyTorch's memory-efficient kernel", pytorch.memory_efficient)
