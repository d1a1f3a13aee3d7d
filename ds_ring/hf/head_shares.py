"""Logits of tokens that tensor-parallel ranks share: each rank gets those of its part of the tokens, and no others."""

# Shapes: n tokens, d hidden size, V vocabulary.
from __future__ import annotations

from functools import partial

from deepspeed.module_inject.layers import LmHeadLinearAllreduce
from torch import Tensor

from ds_ring.hf.decoder import Decoder, head_logits
from ds_ring.hf.forward_replaced import forward_replaced
from ds_ring.transport.base import Transport


def logits_of_share(decoder: Decoder, hidden_nd: Tensor, tp: Transport) -> Tensor:
    """[n / N, V] of the rank-th of N equal parts of the tokens, which all N ranks of ``tp`` have.

    AutoTP cuts a head's input columns, and would sum the ranks' products for all tokens on every rank. Here each rank
    gets its tokens' products from the others: half the bytes, and logits to look at on one rank only.
    """
    head = decoder.model.get_output_embeddings()
    if tp.size > 1 and isinstance(head, LmHeadLinearAllreduce):
        with forward_replaced(head, partial(_sum_of_share, head, tp)):
            return head_logits(decoder, hidden_nd[None])[0]
    share = len(hidden_nd) // tp.size
    return head_logits(decoder, hidden_nd[None, tp.rank * share : (tp.rank + 1) * share])[0]


def _sum_of_share(head: LmHeadLinearAllreduce, tp: Transport, hidden_1nd: Tensor) -> Tensor:
    """The head's forward."""
    columns = head._partition_sizes
    start = sum(columns[: tp.rank])
    product_nV = hidden_1nd[0, :, start : start + columns[tp.rank]] @ head.weight.t()
    logits_nV = tp.all_to_all(product_nV.unflatten(0, (tp.size, -1))).sum(0)
    return (logits_nV if head.bias is None else logits_nV + head.bias)[None]
