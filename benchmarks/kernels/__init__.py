"""Attention, matrix products and transfers by themselves, on one or two GPUs."""
