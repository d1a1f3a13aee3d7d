"""Kernels of our own, in CUDA and Triton, compiled on first use."""
