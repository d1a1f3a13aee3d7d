"""What a model asks of its attention, apart from the tensors."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """Causal attention ``softmax(cap(scale * q k^T)) v``.

    Attributes:
        scale: factor on the scores, usually ``head_dim ** -0.5``.
        window: sliding window; a query at position i sees keys at i - window + 1 .. i. None: all earlier keys.
        softcap: scores become ``softcap * tanh(scores / softcap)``. None: left as they are.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None

    @property
    def plain(self) -> bool:
        return self.window is None and self.softcap is None


@dataclass(frozen=True)
class BlockSpec:
    """What one block of it asks.

    Attributes:
        causal: key j is visible from query i when ``j <= i + shift`` (and inside the window, where there is one);
            otherwise every key is visible from every query.
        shift: global position of the block's first query less that of its first key.
    """

    attention: AttentionSpec
    causal: bool
    shift: int
