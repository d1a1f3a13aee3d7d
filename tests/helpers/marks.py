"""Marks of tests that need hardware which is not everywhere."""

import pytest
import torch

NEEDS_A_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA GPU; run make test-gpu on a machine with one"
)
ON_A_GPU = [pytest.mark.gpu, NEEDS_A_GPU]
