"""The last decoder layer for each sequence's last token only: all that a next token needs of that layer.

The layer runs twice: on all tokens, up to its attention, for their keys and values; then as a whole, on the last
tokens, whose queries attend to those. Both times it is the layer's own code. So nothing here depends on the
architecture, and the result is exact. The projection of all tokens' queries, where it is a module of its own, is
skipped as well.
"""

# Shapes: B sequences, T tokens on this rank, N ranks.
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import Cache

from ds_ring.attention.last_token import everyones, last_token_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.errors import UnsupportedModelError
from ds_ring.hf.attention_context import AttentionContext
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.forward_replaced import forward_replaced
from ds_ring.hf.linear import Linear
from ds_ring.transport.base import Transport


@dataclass(frozen=True)
class LastTokens:
    """Which rank holds the last token of each sequence.

    Attributes:
        lengths: tokens of each sequence.
        held: for each rank of ``transport`` the positions, ascending, of the tokens it holds.
        transport: the ranks that hold a sequence together.
    """

    lengths: tuple[int, ...]
    held: list[list[int]]
    transport: Transport

    def seen(self, window: int | None) -> list[range]:
        """For each sequence, which of this rank's tokens its last token sees."""
        own = self.held[self.transport.rank]
        starts = [0 if window is None else n - window for n in self.lengths]
        return [
            range(bisect_left(own, start), bisect_left(own, n)) for start, n in zip(starts, self.lengths, strict=True)
        ]

    def pick(self, x_BT: Tensor) -> Tensor:
        """The last tokens' values [B, 1, *], on every rank, of values [B or 1, T, *] of this rank's tokens."""
        locations = [self._locate(n - 1) for n in self.lengths]
        # What this rank picks for a token that another rank holds is not used.
        own = [index if rank == self.transport.rank else 0 for rank, index in locations]
        all_BT = x_BT.expand(len(locations), *x_BT.shape[1:])
        picked_B1 = torch.cat([all_BT[b : b + 1, index : index + 1] for b, index in enumerate(own)])
        if self.transport.size == 1:
            return picked_B1
        everyones_NB1 = everyones(picked_B1, self.transport)
        return torch.cat([everyones_NB1[rank, b : b + 1] for b, (rank, _) in enumerate(locations)])

    def _locate(self, position: int) -> tuple[int, int]:
        """(rank, index among its tokens)."""
        for rank, positions in enumerate(self.held):
            index = bisect_left(positions, position)
            if index < len(positions) and positions[index] == position:
                return rank, index
        raise AssertionError(f"no rank holds position {position}")


class _Captured(BaseException):
    """Ends the layer's first call where its attention has its inputs. It is no error, so no handler may catch it."""


@contextmanager
def last_tokens_only(decoder: Decoder, context: AttentionContext, tokens: LastTokens) -> Iterator[None]:
    """Inside the block the model's last layer computes its output for each sequence's last token only.

    It returns that output at all T positions of the sequence, as a view: models reshape what follows their layers by
    the shape of the layers' input.
    """
    layer = decoder.layers[-1]
    own: list[Callable[..., Any]] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _call_twice(layer, context, tokens, own[0], args, kwargs)

    with forward_replaced(layer, forward) as previous:
        own.append(previous)
        yield


def _call_twice(
    layer: nn.Module, context: AttentionContext, tokens: LastTokens, forward: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    count, length = hidden.shape[:2]
    keys_values: list[Tensor] = []

    def capture(q: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
        keys_values.extend((k_BTKD, v_BTKD))
        raise _Captured

    def answer(q_B1HD: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
        return last_token_attention(
            q_B1HD, *keys_values, seen=tokens.seen(spec.window), spec=spec, transport=tokens.transport, sinks_H=sinks_H
        )

    def of_last_tokens(value: Any) -> Any:
        if isinstance(value, Cache):
            return None  # the first call has stored everything
        per_token = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == length
        return tokens.pick(value) if per_token and value.shape[0] in (1, count) else value

    try:
        with context.attending_by(capture), _queries_left_out(layer):
            forward(*args, **kwargs)
    except _Captured:
        pass
    if not keys_values:
        raise UnsupportedModelError(f"{type(layer).__name__} ran without attention: prefill_only cannot shorten it")
    with context.attending_by(answer):
        out = forward(*tree_map(of_last_tokens, args), **tree_map(of_last_tokens, kwargs))
    if isinstance(out, Tensor):
        return out.expand(-1, length, -1)
    return out[0].expand(-1, length, -1), *out[1:]


@contextmanager
def _queries_left_out(layer: nn.Module) -> Iterator[None]:
    """Inside the block a query projection that is a module of its own returns memory that nobody has written."""
    modules = [module for name, module in layer.named_modules() if name.endswith(".q_proj")]
    found = [linear for module in modules if (linear := Linear.of(module)) is not None]
    with ExitStack() as stack:
        for linear in found:
            if linear.parallel != "row_parallel":
                width = linear.weight_NW.shape[1]
                stack.enter_context(forward_replaced(linear.module, _unwritten(width)))
        yield


def _unwritten(width: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.new_empty(*x.shape[:-1], width)
