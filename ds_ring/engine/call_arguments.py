"""Tensors as callers give them: what is none is refused by name, in one line."""

# Shapes: B rows of the caller's batch, C columns.
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ds_ring.errors import InputError


def as_ids(input_ids: object) -> Tensor:
    """[B, C], int64, where they are.

    Raises:
        InputError: no tensor of token ids, or none in it.
    """
    ids = _tensor("input_ids", input_ids)
    if ids.dim() != 2 or not _is_whole(ids) or 0 in ids.shape:
        raise InputError(
            f"input_ids must be whole numbers of shape [batch, length], at least one of each, not "
            f"{tuple(ids.shape)} {ids.dtype}"
        )
    return ids.long()


def as_mask(attention_mask: object) -> Tensor | None:
    """The mask; None: there is none.

    Raises:
        InputError: no tensor.
    """
    return None if attention_mask is None else _tensor("attention_mask", attention_mask)


def as_positions(position_ids: object) -> Tensor | None:
    """The positions; None: there are none.

    Raises:
        InputError: no tensor of whole numbers.
    """
    return _whole("position_ids", position_ids)


def as_targets(target_ids: object) -> Tensor | None:
    """The targets; None: there are none.

    Raises:
        InputError: no tensor of whole numbers.
    """
    return _whole("target_ids", target_ids)


def _whole(name: str, value: object) -> Tensor | None:
    if value is None:
        return None
    tensor = _tensor(name, value)
    if not _is_whole(tensor):
        raise InputError(f"{name} must be whole numbers, not {tensor.dtype}")
    return tensor


def _tensor(name: str, value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value
    hint = ""
    if isinstance(value, Mapping):
        hint = "; call with **, as in model(**tokenizer(text, return_tensors='pt'))"
    elif isinstance(value, list | tuple):
        hint = "; torch.tensor makes one of a list of rows"
    kind = "None" if value is None else f"a {type(value).__name__}"
    raise InputError(f"{name} must be a tensor [batch, length], not {kind}{hint}")


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
