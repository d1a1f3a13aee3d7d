"""More than two micro-batches in flight go through each layer together: all transfers of a layer come at once, and
links may sleep until the next.

Lanes hand over where a layer begins and before they transfer. The last one waits in front of its projections instead:
the others' transfers run under those, and the first that is needed is there.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.utils.hooks import RemovableHandle

from ds_ring.engine.batch_overlap import in_last_lane


class Lockstep:
    """``hand_over`` as ``run_interleaved`` gives it."""

    def __init__(self, hand_over: Callable[[], None]) -> None:
        self._hand_over = hand_over
        self._last_has_waited = False

    def hook(self, layers: nn.ModuleList) -> list[RemovableHandle]:
        """Layers hand over from here on, until the handles are removed."""
        together = [layer.register_forward_pre_hook(self._begin_together) for layer in layers[1:]]
        return together + [layer.register_forward_pre_hook(self._let_last_wait) for layer in layers]

    def before_transfer(self) -> None:
        if in_last_lane() and self._last_has_waited:
            self._last_has_waited = False
        else:
            self._hand_over()

    def _begin_together(self, module: nn.Module, inputs: object) -> None:
        self._hand_over()

    def _let_last_wait(self, module: nn.Module, inputs: object) -> None:
        # Only once: by layers that transfer nothing it would fall behind, further and further.
        if in_last_lane() and not self._last_has_waited:
            self._last_has_waited = True
            self._hand_over()
