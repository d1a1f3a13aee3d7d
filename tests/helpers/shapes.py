"""A model's dimensions for tests of rules, and the rules applied to them."""

from __future__ import annotations

from typing import Any

from ds_ring.config import RunConfig
from ds_ring.model_dims import ModelDims
from ds_ring.planning.validation import check_run

SHAPE = ModelDims(
    model_type="llama", num_layers=4, hidden_size=512, num_heads=28, num_kv_heads=4, head_dim=64,
    intermediate_size=1024, vocab_size=1000, max_positions=4096,
)  # fmt: skip


def check(dims: ModelDims = SHAPE, *, world_size: int | None = None, **options: Any) -> None:
    config = RunConfig.load(None, **options)
    check_run(config, dims, config.topology.world_size if world_size is None else world_size)
