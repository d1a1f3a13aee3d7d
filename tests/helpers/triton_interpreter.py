"""Marks of tests in which Triton's interpreter runs a kernel, on CPU tensors."""

import numpy
import pytest

triton = pytest.importorskip("triton")


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


INTERPRETED = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="with a GPU, tests/gpu/ runs the kernels"),
    pytest.mark.skipif(
        _release(triton.__version__) < (3, 7) and _release(numpy.__version__) >= (2, 4),
        reason="the interpreter of Triton 3.6 needs NumPy < 2.4",
    ),
]
