"""What stands for no target."""

UNSCORED = -100
"""A target that is left out, as in transformers' losses."""
