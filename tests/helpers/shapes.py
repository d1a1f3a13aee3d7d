"""A model's dimensions for tests of rules, and the rules applied to them."""

from __future__ import annotations

from typing import Any

from ds_ring.config import RunConfig
from ds_ring.model_dims import ModelShape
from ds_ring.planning.validation import check_run

SHAPE = ModelShape(
    model_type="llama", num_layers=4, hidden_size=512, num_heads=28, num_kv_heads=4, head_dim=64,
    intermediate_size=1024, vocab_size=1000, max_positions=4096,
)  # fmt: skip


def check(shape: ModelShape = SHAPE, *, world_size: int | None = None, **options: Any) -> None:
    config = RunConfig.load(None, **options)
    check_run(config, shape, config.topology.world_size if world_size is None else world_size)
