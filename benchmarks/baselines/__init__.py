"""Other implementations of sequence parallelism, as engines with the same batch, passes and checks."""
