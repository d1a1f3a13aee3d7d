"""Whether Triton's kernels serve a device and dtype: they are tried once, and a warning says why where they do not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch

log = logging.getLogger("ds_ring")

SelfTest = Callable[[torch.device, torch.dtype], str | None]
"""What keeps a kernel from giving the plain formula's results on small examples; None: nothing."""


@cache
def triton_serves(what: str, self_test: SelfTest, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        reason = "Triton is not installed" if find_spec("triton") is None else self_test(device, dtype)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernels
    except Exception as error:  # whatever a compiler or a driver raises
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        log.warning("%s in %s goes without Triton's kernels: %s", what, dtype, reason)
    return reason is None
