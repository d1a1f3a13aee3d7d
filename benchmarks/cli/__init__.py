"""Commands that measure: bench, compare, longest, check_models, performance and the benchmarks of kernels."""
