"""Without a GPU, Triton's kernels are interpreted. Triton reads the switch when it is first imported: set it before."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
