"""Another forward for one module, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Inside the block ``forward`` is the forward of ``module``; yields the one it had before."""
    previous = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield previous or type(module).forward.__get__(module)
    finally:
        del vars(module)["forward"]
        if previous is not None:
            vars(module)["forward"] = previous
