"""Whether ranks hold the weights between them, and where."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ds_ring.config import RunConfig
from ds_ring.transport.copy_engine import CopyEngineTransport
from ds_ring.transport.mesh import Mesh
from ds_ring.weights.sharded import ShardedWeights


def shared_weights(
    model: PreTrainedModel,
    config: RunConfig,
    mesh: Mesh,
    device: torch.device,
    fill: Callable[[int], None] = lambda number: None,
) -> ShardedWeights | None:
    """Takes ``model`` apart as ``config.weights`` wants it; None: it stays whole. Collective.

    Args:
        fill: as ``ShardedWeights`` takes it.
    """
    if config.weights == "whole":
        return None
    transport = mesh["weights"]
    peers = transport.device if isinstance(transport, CopyEngineTransport) else None
    return ShardedWeights(model, transport, device, peers, config.weights == "streamed", fill)
