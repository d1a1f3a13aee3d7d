"""Attention kernels of our own, built on first use."""
