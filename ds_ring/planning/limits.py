"""What is planned at all: sizes that some machine might have."""

from __future__ import annotations

from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError

MOST_RANKS = 4096
MOST_SEQUENCES = 10**9
MOST_TOKENS = 10**9


def check_size(run: RunConfig, ranks: int) -> None:
    """Refuse what no machine is for, before any arithmetic.

    Raises:
        ConfigError: the value, the limit.
    """
    work = run.workload
    for name, value, most in (
        ("ranks", ranks, MOST_RANKS), ("batch_size", work.batch_size, MOST_SEQUENCES),
        ("max_length", work.max_length, MOST_TOKENS), ("micro_batch_size", work.micro_batch_size, MOST_SEQUENCES),
    ):  # fmt: skip
        if not 1 <= value <= most:
            raise ConfigError(f"{name}={value} cannot be planned; take 1 to {most}")
