"""What layouts need to know of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelDims:
    """What layouts need to know of a model.

    Attributes:
        num_kv_heads, head_dim: of every layer or, where layers differ, the fewest and the largest.
        max_positions: how many positions the model has an encoding for; None: rotary ones have no end.
        intended_positions: how many it was made for, as far as its config says.
        unlike_layers: where layers differ, (key/value heads, head_dim) of each.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int | None
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    softcap: float | None = None
    unlike_layers: tuple[tuple[int, int], ...] = ()
    intended_positions: int | None = None

    @property
    def heads_of_layers(self) -> tuple[tuple[int, int], ...]:
        """(key/value heads, head_dim) of every layer."""
        return self.unlike_layers or ((self.num_kv_heads, self.head_dim),) * self.num_layers

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many positions every layer sees; None: all."""
        kinds = self.layer_types or ("sliding_attention",) * self.num_layers
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in kinds)
