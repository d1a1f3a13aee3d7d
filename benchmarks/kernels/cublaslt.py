"""Matrix products by any of cuBLASLt's algorithms for them, with what a layer wants done at their end.

PyTorch takes the one that cuBLASLt's heuristic puts first, and adds a bias or a matrix, never both. Here a product is
``out = x @ weight.T [+ bias] [+ added]``, or the tanh GELU of the first two, by the algorithm that is asked for.
"""

# Shapes: M rows, N columns in, W columns out.
from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_ring.errors import DsRingError

WORKSPACE_BYTES = 64 << 20

# Of cublasLt.h and library_types.h.
_TYPES = {torch.float16: 2, torch.bfloat16: 14}
_FLOAT32, _COMPUTE_32F, _TRANSPOSED, _AS_IT_IS = 0, 68, 1, 0
_TRANSPOSE_A, _TRANSPOSE_B, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8
_PLAIN, _BIAS, _GELU_BIAS = 1, 4, 36
_MAX_WORKSPACE = 1
_CONFIGURATION = {"id": 0, "tile": 1, "split": 2, "swizzle": 4, "option": 5, "stages": 6, "inner": 7, "cluster": 8}


class _Algorithm(ctypes.Structure):
    _fields_ = [("data", c_uint64 * 8)]


class _Found(ctypes.Structure):
    _fields_ = [
        ("algorithm", _Algorithm),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


@dataclass(frozen=True)
class Candidate:
    """One algorithm for one product.

    Attributes:
        rank: its place in the heuristic's order; 0 is what PyTorch would take.
        configuration: cuBLASLt's numbers for tile, stages, cluster and so on.
        run: computes ``out``, on the current stream.
    """

    rank: int
    configuration: dict[str, int]
    run: Callable[[], None]


def candidates(
    x_MN: Tensor,
    weight_WN: Tensor,
    out_MW: Tensor,
    *,
    bias_W: Tensor | None = None,
    added_MW: Tensor | None = None,
    gelu: bool = False,
    most: int = 32,
) -> list[Candidate]:
    """The heuristic's algorithms, first to last.

    Args:
        x_MN, weight_WN, out_MW, added_MW: contiguous, of one half-precision dtype; ``added_MW`` may be ``out_MW``. With
            ``bias_W`` they are where they are for as long as a candidate is used.
        gelu: of ``x @ weight.T + bias``, which is then needed and to which nothing is added.

    Raises:
        DsRingError: the library is missing or refuses.
    """
    assert x_MN.dtype in _TYPES
    assert all(t.is_contiguous() for t in (x_MN, weight_WN, out_MW))
    assert not gelu or (bias_W is not None and added_MW is None)
    library, kind = _library(), _TYPES[x_MN.dtype]
    (rows, width_in), width_out = x_MN.shape, weight_WN.shape[0]
    # Column-major, as the library has it: out.T = weight.T.T @ x.T.
    operation = _made(library.cublasLtMatmulDescCreate, _COMPUTE_32F, _FLOAT32)
    _set(library, operation, _TRANSPOSE_A, c_int32(_TRANSPOSED))
    _set(library, operation, _TRANSPOSE_B, c_int32(_AS_IT_IS))
    _set(library, operation, _EPILOGUE, c_uint32(_GELU_BIAS if gelu else _PLAIN if bias_W is None else _BIAS))
    if bias_W is not None:
        _set(library, operation, _BIAS_POINTER, c_void_p(bias_W.data_ptr()))
    weight, x, out = (
        _made(library.cublasLtMatrixLayoutCreate, kind, c_uint64(a), c_uint64(b), c_int64(a))
        for a, b in ((width_in, width_out), (width_in, rows), (width_out, rows))
    )
    preference = _made(library.cublasLtMatmulPreferenceCreate)
    limit = c_size_t(WORKSPACE_BYTES)
    set_limit = library.cublasLtMatmulPreferenceSetAttribute
    _check(set_limit(preference, _MAX_WORKSPACE, byref(limit), c_size_t(sizeof(limit))), "the workspace")
    found, count = (_Found * most)(), c_int()
    code = library.cublasLtMatmulAlgoGetHeuristic(
        _handle(x_MN.device), operation, weight, x, out, out, preference, most, found, byref(count)
    )
    _check(code, "the heuristic")
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=x_MN.device)
    alpha, beta = c_float(1.0), c_float(0.0 if added_MW is None else 1.0)
    c_pointer = c_void_p((out_MW if added_MW is None else added_MW).data_ptr())

    def run(algorithm: _Algorithm) -> None:
        code = library.cublasLtMatmul(
            _handle(x_MN.device), operation, byref(alpha), c_void_p(weight_WN.data_ptr()), weight,
            c_void_p(x_MN.data_ptr()), x, byref(beta), c_pointer, out, c_void_p(out_MW.data_ptr()), out,
            byref(algorithm), c_void_p(workspace.data_ptr()), c_size_t(WORKSPACE_BYTES),
            c_void_p(torch.cuda.current_stream(x_MN.device).cuda_stream),
        )  # fmt: skip
        _check(code, "a product")

    return [
        Candidate(n, _configuration(library, one.algorithm), partial(run, one.algorithm))
        for n, one in enumerate(found[: count.value])
        if one.state == 0
    ]


def _configuration(library: Any, algorithm: _Algorithm) -> dict[str, int]:
    values = {}
    for name, attribute in _CONFIGURATION.items():
        value, written = c_uint64(0), c_size_t()
        size = c_size_t(2 if name in ("inner", "cluster") else 4)
        code = library.cublasLtMatmulAlgoConfigGetAttribute(
            byref(algorithm), attribute, byref(value), size, byref(written)
        )
        values[name] = value.value if code == 0 else -1
    return values


def _made(create: Any, *arguments: Any) -> c_void_p:
    pointer = c_void_p()
    _check(create(byref(pointer), *arguments), create.__name__)
    return pointer


def _set(library: Any, operation: c_void_p, attribute: int, value: Any) -> None:
    code = library.cublasLtMatmulDescSetAttribute(operation, attribute, byref(value), c_size_t(sizeof(value)))
    _check(code, f"attribute {attribute}")


def _check(code: int, what: str) -> None:
    if code:
        raise DsRingError(f"cuBLASLt refuses {what} with status {code}")


@lru_cache(maxsize=8)
def _handle(device: torch.device) -> c_void_p:
    with torch.cuda.device(device):
        return _made(_library().cublasLtCreate)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """The one that PyTorch has loaded."""
    torch.cuda.init()
    maps = Path("/proc/self/maps").read_text().split()
    loaded = next((path for path in maps if "libcublasLt.so" in path), None)
    try:
        return ctypes.CDLL(loaded or f"libcublasLt.so.{(torch.version.cuda or '12').partition('.')[0]}")
    except OSError as error:
        raise DsRingError(f"cuBLASLt cannot be loaded: {error}") from error
