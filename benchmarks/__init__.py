"""Measuring ds_ring: layouts, kernels and other implementations, and the pages made from records."""
