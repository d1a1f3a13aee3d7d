"""A batch as runners take it: checked, and packed so that the tokens of every sequence start at column 0."""

# Shapes: B sequences, C columns of the caller's tensors, L tokens of the longest sequence.
from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ds_ring.errors import InputError
from ds_ring.kv_cache.step import Step
from ds_ring.model_dims import ModelDims


@dataclass(frozen=True)
class Batch:
    """Sequences of tokens. Shorter ones are padded at the end, where causal attention hides padding without a mask.

    Attributes:
        ids_BL: token ids; padding is 0.
        position_ids_BL: what the model's position encoding is given for each token.
        lengths: tokens of each sequence.
        sequences: which sequences of the caller's batch these are.
    """

    ids_BL: Tensor
    position_ids_BL: Tensor
    lengths: tuple[int, ...]
    sequences: range

    in_order: ClassVar[bool] = False
    """Whether a micro-batch needs the keys and values of the one before it, layer by layer."""

    @property
    def length(self) -> int:
        return self.ids_BL.shape[1]

    def rope_lengths(self) -> tuple[int, ...]:
        """The length of each whole sequence as its position encoding takes it: the highest position + 1."""
        return tuple((self.position_ids_BL.max(1).values + 1).tolist())

    def split(self, sequences: range) -> Batch:
        """These ``sequences``, counted in this batch, cut to the longest of them."""
        chosen = slice(sequences.start, sequences.stop)
        lengths = self.lengths[chosen]
        cut = chosen, slice(0, max(lengths))
        return Batch(self.ids_BL[cut], self.position_ids_BL[cut], lengths, self.sequences[chosen])

    def micro_batches(self, size: int) -> list[Batch]:
        count = len(self.sequences)
        return [self.split(range(i, min(i + size, count))) for i in range(0, count, size)]

    def step(self, positions_T: Tensor, device: torch.device) -> Step | None:
        """What attention does with a cache, for the packed positions on this rank; None: there is no cache."""
        return None

    def digest(self) -> str:
        """Equal on two ranks exactly when they were given the same tokens at the same positions."""
        # Padding is token 0, so that only the lengths tell it from a token.
        parts = self.ids_BL, self.position_ids_BL, torch.tensor(self.lengths)
        content = b"".join(part.cpu().long().contiguous().numpy().tobytes() for part in parts)
        return f"{tuple(self.ids_BL.shape)} tokens with digest {hashlib.sha256(content).hexdigest()[:12]}"


def pack(
    input_ids_BC: Tensor, attention_mask_BC: Tensor | None, position_ids_BC: Tensor | None, dims: ModelDims
) -> tuple[Batch, Tensor]:
    """Check the caller's tensors and move the tokens of every sequence to the left edge.

    Args:
        input_ids_BC: token ids, padded on either side where lengths differ.
        attention_mask_BC: 1 for tokens, 0 for padding; None: no padding.
        position_ids_BC: positions for the model; None: every sequence counts its own tokens from 0, as
            ``generate`` does.

    Returns:
        The batch, and columns_BL: the caller's column of every packed token, -1 at padding.

    Raises:
        InputError: tensors of wrong shape, empty sequences, ids outside the vocabulary, or more tokens than positions.
    """
    if input_ids_BC.dim() != 2 or input_ids_BC.is_floating_point():
        raise InputError(
            f"input_ids must be whole numbers of shape [batch, length], not {tuple(input_ids_BC.shape)} "
            f"{input_ids_BC.dtype}"
        )
    count, columns = input_ids_BC.shape
    if count == 0 or columns == 0:
        raise InputError(f"input_ids of shape {tuple(input_ids_BC.shape)} hold no token")
    device = input_ids_BC.device
    for name, tensor in (("attention_mask", attention_mask_BC), ("position_ids", position_ids_BC)):
        if tensor is not None and tensor.shape != input_ids_BC.shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, input_ids {tuple(input_ids_BC.shape)}")
    if attention_mask_BC is None:
        columns_BL = torch.arange(columns, device=device).expand(count, columns)
        lengths = [columns] * count
    else:
        visible_BC = attention_mask_BC.to(device) != 0
        lengths = visible_BC.sum(1).tolist()
        if min(lengths) == 0:
            raise InputError(f"row {lengths.index(0)} of the batch is empty: its attention_mask has no 1")
        # A stable sort keeps tokens in order and puts them before the padding.
        order_BC = torch.sort((~visible_BC).to(torch.int8), dim=1, stable=True).indices[:, : max(lengths)]
        columns_BL = torch.where(visible_BC.gather(1, order_BC), order_BC, -1)
        span_B = columns_BL.max(1).values - columns_BL[:, 0] + 1
        if dims.sliding_window is not None and span_B.tolist() != lengths:
            raise InputError("attention_mask has holes inside a row, which a sliding window cannot be packed over")
    at_BL = columns_BL.clamp(min=0)
    real_BL = columns_BL >= 0
    ids_BL = input_ids_BC.gather(1, at_BL) * real_BL
    lowest, highest = int(ids_BL.min()), int(ids_BL.max())
    if lowest < 0 or highest >= dims.vocab_size:
        raise InputError(f"token id {lowest if lowest < 0 else highest} is outside the vocabulary of {dims.vocab_size}")
    if position_ids_BC is not None and attention_mask_BC is None and (position_ids_BC.diff(dim=1) != 1).any():
        raise InputError(
            "position_ids do not count up by 1: transformers would take the rows for packed sequences that do not see "
            "each other, which cannot be sharded yet; give every sequence a row of its own"
        )
    if position_ids_BC is None:
        positions_BL = torch.arange(ids_BL.shape[1], device=device) * real_BL
    else:
        positions_BL = position_ids_BC.to(device).gather(1, at_BL) * real_BL
    lowest, highest = int(positions_BL.min()), int(positions_BL.max())
    if lowest < 0 or (dims.max_positions is not None and highest >= dims.max_positions):
        raise InputError(
            f"position {lowest if lowest < 0 else highest} is outside the model's "
            f"max_position_embeddings={dims.max_positions}"
        )
    return Batch(ids_BL, positions_BL, tuple(lengths), range(count)), columns_BL
