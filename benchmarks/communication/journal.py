"""How to do again, alone, what a rank does to send and receive in a pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Journal = list[Callable[[], object]]
"""In the order in which it was done. Doing it again counts nothing."""


def blanks(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Makes tensors of the same shapes and dtypes, without keeping the given ones alive."""
    likes = [(t.shape, t.dtype, t.device) for t in tensors]
    return lambda: [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in likes]
