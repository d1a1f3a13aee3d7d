"""The cache of a generation as a transformers ``Cache``: each rank holds a shard."""

# Shapes: B sequences of the caller's batch, C columns seen so far.
from __future__ import annotations

from itertools import groupby
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from ds_ring.errors import DsRingError, InputError
from ds_ring.kv_cache.shard import KVCacheShard
from ds_ring.utils.numbers import whole_number

BROKEN = (
    "past_key_values is broken: the generate that last wrote to it was interrupted or failed; begin without it, from "
    "the whole conversation"
)


class ShardedCache(Cache):
    """Passed back to ``Engine.generate`` it continues a conversation, as in transformers.

    For attention, the position of a token is its column minus the first column of its sequence. Padding inside a
    sequence, such as after an early end, then counts in sliding windows as it does in transformers.

    A copy (``copy.deepcopy``) has memory of its own and goes on by itself. What changes a cache from outside (``crop``,
    ``batch_select_indices``, ``batch_repeat_interleave``, ``reorder_cache``) is called on every rank alike; nothing is
    sent.

    Attributes:
        owner: the runner it belongs to.
        cache_shard: this rank's shard, of this replica's ``sequences``.
        first_B: the column of the first token of every sequence, its position 0, even where a mask hides it later.
        whole: the generation that last wrote to it has returned. Otherwise some layers may lack what others hold, and
            the caller does not know the tokens.
    """

    def __init__(self, owner: Any, cache_shard: KVCacheShard, sequences: range) -> None:
        super().__init__(layers=[])
        self.owner, self.cache_shard, self.sequences = owner, cache_shard, sequences
        self.first_B = torch.empty(0, dtype=torch.long)
        self._masks: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._columns = 0
        self._extended: list[tuple[int, tuple[int, ...]]] = []
        """For every call of ``extend`` the columns and the filled slots of all ranks before it."""
        self.whole = True

    def __repr__(self) -> str:
        rows = ", ".join(map(str, self.tokens[:8])) + (", …" if len(self.tokens) > 8 else "")
        broken = "" if self.whole else "; broken: the generate that wrote to it was interrupted"
        return (
            f"ShardedCache({self._columns} columns of {len(self.tokens)} rows with {rows or 0} tokens; "
            f"{self.cache_shard.used} slots on the ranks of a replica{broken})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedCache:
        found = type(self).__new__(type(self))
        found.__dict__.update(self.__dict__)
        found.layers, found._masks, found._ids = [], list(self._masks), list(self._ids)
        found._extended = list(self._extended)
        found.cache_shard = self.cache_shard.selected(range(len(self.sequences)))
        memo[id(self)] = found
        return found

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise InputError(
            "a ShardedCache cannot be pickled or saved: it is one rank's part, and belongs to its engine; keep the "
            "token ids and generate from them, or take copy.deepcopy for a branch in this process"
        )

    def __copy__(self) -> ShardedCache:
        """Two caches that share memory would write over each other."""
        return self.__deepcopy__({})

    @property
    def tokens(self) -> list[int]:
        """How many tokens of each row are held."""
        return self.mask_BC.sum(1).tolist() if self._masks else []

    def memory_bytes(self) -> int:
        """Bytes of this rank's shard, empty slots included."""
        return self.cache_shard.nbytes

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included: what transformers counts."""
        return self._columns

    @property
    def mask_BC(self) -> Tensor:
        """Which columns hold a token, of all sequences of the batch; bool, on the CPU."""
        self._masks = [torch.cat(self._masks, dim=1)]
        return self._masks[0]

    @property
    def ids_BC(self) -> Tensor:
        """The token ids in all columns, of all sequences of the batch; on the CPU. What the caller gave in columns that
        are padding counts for nothing."""
        # Those of many steps come from the device in one copy.
        by_device = groupby(self._ids, key=lambda ids_BC: ids_BC.device)
        self._ids = [torch.cat([torch.cat(list(parts), dim=1).cpu() for _, parts in by_device], dim=1)]
        return self._ids[0]

    def extend(self, ids_BC: Tensor, mask_BC: Tensor) -> None:
        """Count new columns, before they get slots; ``mask_BC`` is bool, on the CPU, with a token in every sequence.
        The ids are copied, on their device: nothing waits for it."""
        if not self._masks:
            self.first_B = mask_BC.int().argmax(1)
        self._extended.append((self._columns, tuple(self.cache_shard.used)))
        self._masks.append(mask_BC)
        self._ids.append(ids_BC.clone())
        self._columns += mask_BC.shape[1]

    def clear(self) -> None:
        """Forget everything: no column has been seen."""
        self.cache_shard = self.cache_shard.emptied()
        self._masks, self._ids, self._extended, self._columns = [], [], [], 0

    @torch.inference_mode()
    def revise(self, mask_BC: Tensor) -> None:
        """Forget tokens that the caller's mask now hides, such as those after an early end.

        Raises:
            InputError: the mask shows columns that were padding when they were run.
        """
        known_BC = self.mask_BC
        if (mask_BC & ~known_BC).any():
            sequence = int((mask_BC & ~known_BC).any(1).nonzero()[0])
            raise InputError(
                f"attention_mask shows columns of row {sequence} that were padding when the cache was made"
            )
        if torch.equal(mask_BC, known_BC):
            return
        own = slice(self.sequences.start, self.sequences.stop)
        self.cache_shard.hide((known_BC & ~mask_BC)[own], self.first_B[own])
        self._masks = [mask_BC]

    def first_difference(self, ids_BC: Tensor, mask_BC: Tensor) -> tuple[int, int, int, int] | None:
        """(row, column, id held, id given) of the first column in which another token is held than given; None: none
        is. Both of all columns held; columns that are padding, here or there, do not count."""
        held_BC = self.ids_BC
        differs_BC = (held_BC != ids_BC) & mask_BC & self.mask_BC
        if not differs_BC.any():
            return None
        column = int(differs_BC.any(0).int().argmax())
        row = int(differs_BC[:, column].int().argmax())
        return row, column, int(held_BC[row, column]), int(ids_BC[row, column])

    @torch.inference_mode()
    def crop(self, max_length: int) -> None:
        """Forget the last columns. Memory that a whole call of ``generate`` or a step took is free for the next one.

        Args:
            max_length: columns that are left; where negative, the number of those to forget; 0 forgets nothing.

        Raises:
            InputError: no whole number; nothing of a row would be left; or what is left could not go on as if the rest
                had never been: layers with a sliding window have let go of tokens, or other rotary frequencies were in
                use.
        """
        max_length = whole_number("crop's max_length", max_length)
        columns = max_length if max_length > 0 else self._columns + max_length
        if columns >= self._columns:
            return
        self._check_changeable()
        left_B = self.mask_BC[:, : max(columns, 0)].sum(1)
        if not left_B.all():
            raise InputError(
                f"crop({max_length}) leaves no token of row {int((left_B == 0).int().argmax())}; begin without a cache"
            )
        at = max(i for i, (before, _) in enumerate(self._extended) if before <= columns)
        ends = [*self._extended[1:], (self._columns, tuple(self.cache_shard.used))]
        partly = self._extended[at][0] < columns
        self._check_windows()
        if partly:
            self._check_rope(left_B, self.mask_BC[:, : ends[at][0]].sum(1), max_length)
        own = slice(self.sequences.start, self.sequences.stop)
        used = ends[at][1] if partly else self._extended[at][1]
        self.cache_shard.crop(used, (columns - self.first_B)[own], partly)
        self._extended = self._extended[: at + partly]
        self._masks, self._ids = [self.mask_BC[:, :columns]], [self.ids_BC[:, :columns]]
        self._columns = columns

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these numbers, in this order; a row may be there several times.

        Raises:
            InputError: no tensor of row numbers; no such row; or rows are shared among replicas.
        """
        self._check_changeable()
        if not isinstance(indices, Tensor) or indices.dim() != 1 or indices.is_floating_point():
            raise InputError(
                f"rows of a cache are selected by a tensor [rows] of their numbers, not by a {type(indices).__name__}"
                + (f" {tuple(indices.shape)} {indices.dtype}" if isinstance(indices, Tensor) else "")
            )
        indices, count = indices.cpu(), len(self.first_B)
        rows = (indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices).tolist()
        if beyond := [row for row in rows if not -count <= row < count]:
            raise InputError(f"there is no row {beyond[0]} in a cache of {count} rows")
        if not rows:
            raise InputError(f"a cache of {count} rows cannot become one of none")
        if len(self.sequences) < count:
            raise InputError(
                f"rows of a cache whose {count} rows are shared among replicas cannot be selected or repeated; take "
                f"dp_size=1"
            )
        rows = [row % count for row in rows]
        self.cache_shard = self.cache_shard.selected(rows)
        self.sequences, self.first_B = range(len(rows)), self.first_B[rows]
        self._masks, self._ids = [self.mask_BC[rows]], [self.ids_BC[rows]]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, one after the other: a prefix for that many questions at once."""
        repeats = whole_number("repeats", repeats, least=1)
        self.batch_select_indices(torch.arange(len(self.first_B)).repeat_interleave(repeats))

    def _check_changeable(self) -> None:
        if not self.whole:
            raise InputError(BROKEN)
        if not self._columns:
            raise InputError("the cache holds nothing yet")

    def _check_windows(self) -> None:
        """Refuse where a rank may have replaced a token that is seen again once later ones are gone."""
        dims, windows = self.owner.dims, set(self.cache_shard.windows)
        if dims.sliding_window is not None and (not dims.layer_types or "sliding_attention" in dims.layer_types):
            windows.add(dims.sliding_window)  # on every rank, though not every stage of a pipeline has such layers
        span = int((self._columns - self.first_B).max())
        if windows and span > min(windows):
            raise InputError(
                f"a cache of {span} columns cannot be cropped: layers with a sliding window of {min(windows)} have let "
                f"go of tokens that would be seen again; keep a copy from before (copy.deepcopy)"
            )

    def _check_rope(self, left_B: Tensor, run_B: Tensor, max_length: int) -> None:
        rope = self.owner.rope
        if rope.matter and any(
            rope.regime(left) != rope.regime(run) for left, run in zip(left_B.tolist(), run_B.tolist(), strict=True)
        ):
            raise InputError(
                f"crop({max_length}) would leave keys with the rotary frequencies of a longer text; crop to where a "
                f"call of generate began, or keep a copy from before (copy.deepcopy)"
            )

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self._columns > 0

    @property
    def is_croppable(self) -> bool:
        """Whether transformers' loop may run ahead and crop."""
        return False

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise DsRingError(
            "a ShardedCache is written by the engine that made it, inside generate: other models, update and reset are "
            "not supported"
        )

    update = reset = _refuse
