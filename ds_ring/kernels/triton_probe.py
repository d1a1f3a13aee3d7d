"""Whether Triton kernels can be used on a device and for a dtype: a self-test runs once, and a failure is a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch

log = logging.getLogger("ds_ring")

SelfTest = Callable[[torch.device, torch.dtype], str | None]
"""In which case of a small example a kernel's results differ from those of the PyTorch formula; None: in no case."""


@cache
def triton_usable(what: str, self_test: SelfTest, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``self_test`` passes; ``what`` names the operation in the warning."""
    try:
        reason = "Triton is not installed" if find_spec("triton") is None else self_test(device, dtype)
    except torch.OutOfMemoryError:
        raise  # this is no failure of the kernels
    except Exception as error:  # whatever a compiler or a driver raises
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        log.warning("%s in %s goes without Triton's kernels: %s", what, dtype, reason)
    return reason is None
