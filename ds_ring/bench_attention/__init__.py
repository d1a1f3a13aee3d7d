"""The attention benchmark: which blocks, by which implementations, how they are timed, and against what."""
