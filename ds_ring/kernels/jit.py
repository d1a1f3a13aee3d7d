"""CUDA sources compiled on first use by PyTorch's extension builder, once for each source and GPU architecture."""

from __future__ import annotations

import ctypes
import hashlib
import logging
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger("ds_ring")


@cache
def unavailable(device: torch.device) -> str | None:
    """Why kernels for sm_90a (Hopper) cannot be used on ``device``; None where they can."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return f"{torch.cuda.get_device_name(device)} is not a Hopper GPU"
    from torch.utils.cpp_extension import CUDA_HOME

    return None if CUDA_HOME else "there is no CUDA compiler (nvcc) to build it with"


@cache
def load_sm90(name: str) -> ctypes.CDLL:
    """The library built from ``kernels/sm90/{name}.cu`` and its headers.

    It is kept in PyTorch's extension cache under a hash of the sources. Ranks that build at the same time wait for one
    another.
    """
    from torch.utils import cpp_extension

    folder = Path(__file__).parent / "sm90"
    files = sorted((*folder.glob("*.cu"), *folder.glob("*.cuh")))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    library = f"ds_ring_{name}_sm90a_{digest}"
    if not (Path(cpp_extension._get_build_directory(library, False)) / f"{library}.so").exists():
        log.warning("building %s.cu for sm_90a (once, about half a minute)", name)
    path = cpp_extension.load(
        library,
        [str(folder / f"{name}.cu")],
        extra_cuda_cflags=["-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a"],
        is_python_module=False,
    )
    return ctypes.CDLL(str(path))
