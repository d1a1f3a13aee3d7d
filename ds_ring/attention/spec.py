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
