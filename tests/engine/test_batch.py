"""Packing a caller's batch: every row's tokens at the left edge, in order, with the column each came from."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_ring.engine.batch import Batch, pack
from ds_ring.errors import InputError
from ds_ring.model_dims import ModelDims

SHAPE = ModelDims(
    model_type="llama", num_layers=1, hidden_size=8, num_heads=2, num_kv_heads=2, head_dim=4,
    intermediate_size=16, vocab_size=100, max_positions=64,
)  # fmt: skip
SLIDING = replace(SHAPE, sliding_window=4)
PAD = 99


def tokens(*sequences: list[int]) -> Tensor:
    return torch.tensor(sequences)


def masked(ids: Tensor) -> Tensor:
    return (ids != PAD).long()


def packed(ids: Tensor, position_ids: Tensor | None = None, dims: ModelDims = SHAPE) -> tuple[Batch, Tensor]:
    return pack(ids, masked(ids), position_ids, dims)


def refused(text: str):
    return pytest.raises(InputError, match=f"^{re.escape(text)}$")


def test_without_a_mask_every_column_is_a_token():
    batch, columns_BL = pack(tokens([5, 6, 7], [1, 2, 3]), None, None, SHAPE)
    assert batch.ids_BL.tolist() == [[5, 6, 7], [1, 2, 3]]
    assert batch.position_ids_BL.tolist() == columns_BL.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert (batch.lengths, batch.length, batch.sequences) == ((3, 3), 3, range(2))


@pytest.mark.parametrize(
    ("ids", "columns"),
    [
        ([PAD, PAD, 5, 6], [2, 3]),
        ([5, 6, PAD, PAD], [0, 1]),
        ([PAD, 5, 6, PAD], [1, 2]),
        ([5, PAD, 6, PAD], [0, 2]),
        ([PAD, 5, PAD, 6], [1, 3]),
    ],
    ids=["left", "right", "both", "hole", "left and hole"],
)
def test_padding_on_any_side_goes_to_the_end(ids, columns):
    batch, columns_BL = packed(tokens(ids))
    assert batch.ids_BL.tolist() == [[5, 6]]
    assert batch.position_ids_BL.tolist() == [[0, 1]]
    assert columns_BL.tolist() == [columns]
    assert batch.lengths == (2,)


def test_unequal_rows_are_cut_to_the_longest_and_padded_with_zero():
    batch, columns_BL = packed(tokens([PAD, PAD, PAD, 5], [PAD, 1, 2, 3], [7, 8, PAD, PAD]))
    assert batch.ids_BL.tolist() == [[5, 0, 0], [1, 2, 3], [7, 8, 0]]
    assert batch.position_ids_BL.tolist() == [[0, 0, 0], [0, 1, 2], [0, 1, 0]]
    assert columns_BL.tolist() == [[3, -1, -1], [1, 2, 3], [0, 1, -1]]
    assert (batch.lengths, batch.length) == ((1, 3, 2), 3)


def test_given_positions_travel_with_their_tokens():
    ids = tokens([PAD, 5, 6, 7], [1, 2, PAD, PAD])
    batch, _ = packed(ids, tokens([1, 10, 20, 30], [4, 5, 6, 7]))
    assert batch.position_ids_BL.tolist() == [[10, 20, 30], [4, 5, 0]]
    counting = torch.arange(3, 7)[None]
    assert pack(ids[:1], None, counting, SHAPE)[0].position_ids_BL.tolist() == [[3, 4, 5, 6]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype_mean_the_same(dtype):
    ids = tokens([PAD, 5, 6], [1, 2, 3])
    got, columns_BL = pack(ids, masked(ids).to(dtype), None, SHAPE)
    want, want_columns_BL = packed(ids)
    assert torch.equal(got.ids_BL, want.ids_BL)
    assert torch.equal(columns_BL, want_columns_BL)


@settings(max_examples=100)
@given(data=st.data(), columns=st.integers(1, 12), count=st.integers(1, 4))
def test_any_mask_keeps_every_token_once_and_in_order(data, columns, count):
    ids = torch.arange(count * columns).view(count, columns) + 1
    sequences = st.lists(st.booleans(), min_size=columns, max_size=columns).filter(any)
    mask = torch.tensor([data.draw(sequences) for _ in range(count)])
    batch, columns_BL = pack(ids, mask, None, SHAPE)
    for sequence in range(count):
        n = batch.lengths[sequence]
        want = ids[sequence][mask[sequence]].tolist()
        assert batch.ids_BL[sequence].tolist() == want + [0] * (batch.length - n)
        assert ids[sequence][columns_BL[sequence, :n]].tolist() == want
        assert (columns_BL[sequence, n:] == -1).all()
        assert batch.position_ids_BL[sequence, :n].tolist() == list(range(n))
    assert batch.length == max(batch.lengths)


class TestSlidingWindow:
    """Packing over a hole would bring tokens nearer to each other than the window counts them."""

    @pytest.mark.parametrize("ids", [[PAD, 5, 6, 7], [5, 6, PAD, PAD], [PAD, 5, 6, PAD]])
    def test_padding_at_the_ends_is_fine(self, ids):
        assert packed(tokens(ids), dims=SLIDING)[0].ids_BL[0, 0] == 5

    def test_a_hole_is_refused(self):
        with refused("attention_mask has holes inside a row, which a sliding window cannot be packed over"):
            packed(tokens([1, 2, 3, 4], [5, PAD, 6, 7]), dims=SLIDING)


class TestRefused:
    @pytest.mark.parametrize(
        ("ids", "text"),
        [
            (torch.ones(3).long(), "input_ids must be whole numbers of shape [batch, length], not (3,) torch.int64"),
            (torch.ones(2, 3), "input_ids must be whole numbers of shape [batch, length], not (2, 3) torch.float32"),
            (torch.ones(1, 2, 3).long(),
             "input_ids must be whole numbers of shape [batch, length], not (1, 2, 3) torch.int64"),
            (torch.ones(0, 3).long(), "input_ids of shape (0, 3) hold no token"),
            (torch.ones(2, 0).long(), "input_ids of shape (2, 0) hold no token"),
            (tokens([1, 100]), "token id 100 is outside the vocabulary of 100"),
            (tokens([1, -1]), "token id -1 is outside the vocabulary of 100"),
            (torch.ones(1, 65).long(), "position 64 is outside the model's max_position_embeddings=64"),
        ],
        ids=["one axis", "floats", "three axes", "no row", "no column", "too large", "negative", "too long"],
    )  # fmt: skip
    def test_input_ids(self, ids, text):
        with refused(text):
            pack(ids, None, None, SHAPE)

    @pytest.mark.parametrize("which", ["attention_mask", "position_ids"])
    def test_a_tensor_of_another_shape(self, which):
        other = {"attention_mask": None, "position_ids": None, which: torch.ones(2, 4).long()}
        with refused(f"{which} has shape (2, 4), input_ids (2, 3)"):
            pack(torch.ones(2, 3).long(), *other.values(), SHAPE)

    def test_a_row_without_a_token(self):
        with refused("row 1 of the batch is empty: its attention_mask has no 1"):
            packed(tokens([1, 2], [PAD, PAD], [PAD, PAD]))

    def test_a_given_position_beyond_the_models(self):
        with refused("position 64 is outside the model's max_position_embeddings=64"):
            pack(tokens([1, 2]), None, tokens([63, 64]), SHAPE)
        with refused("position -1 is outside the model's max_position_embeddings=64"):
            pack(tokens([1, 2]), None, tokens([-1, 0]), SHAPE)

    @pytest.mark.parametrize("positions", [[0, 1, 0, 1], [0, 2, 4, 6], [3, 2, 1, 0]])
    def test_positions_that_transformers_takes_for_packed_sequences(self, positions):
        with refused(
            "position_ids do not count up by 1: transformers would take the rows for packed sequences that do not see "
            "each other, which cannot be sharded yet; give every sequence a row of its own"
        ):
            pack(tokens([1, 2, 3, 4]), None, tokens(positions), SHAPE)

    def test_what_padding_holds_does_not_matter(self):
        ids, mask = tokens([-100, 1, 2, 10**6]), tokens([0, 1, 1, 0])
        assert pack(ids, mask, tokens([-1, 0, 1, 10**6]), SHAPE)[0].ids_BL.tolist() == [[1, 2]]

    def test_a_model_without_a_limit_takes_any_length(self):
        assert pack(torch.ones(1, 500).long(), None, None, replace(SHAPE, max_positions=None))[0].length == 500


class TestMicroBatches:
    BATCH = packed(tokens([PAD, PAD, 1], [1, 2, 3], [PAD, 4, 5], [PAD, 6, 7], [8, PAD, PAD]))[0]

    @pytest.mark.parametrize(
        ("size", "sequences"),
        [(1, [[0], [1], [2], [3], [4]]), (2, [[0, 1], [2, 3], [4]]), (4, [[0, 1, 2, 3], [4]]), (9, [[0, 1, 2, 3, 4]])],
    )
    def test_rows_are_dealt_out_in_order_and_the_rest_comes_last(self, size, sequences):
        assert [list(m.sequences) for m in self.BATCH.micro_batches(size)] == sequences

    def test_each_is_cut_to_its_own_longest_row(self):
        micro_batches = self.BATCH.micro_batches(2)
        assert [m.length for m in micro_batches] == [3, 2, 1]
        assert [m.lengths for m in micro_batches] == [(1, 3), (2, 2), (1,)]
        assert micro_batches[1].ids_BL.tolist() == [[4, 5], [6, 7]]
        assert micro_batches[1].position_ids_BL.tolist() == [[0, 1], [0, 1]]
        assert micro_batches[2].ids_BL.tolist() == [[8]]

    def test_rows_of_a_split_still_count_in_the_callers_batch(self):
        replica = self.BATCH.split(range(2, 5))
        assert replica.sequences == range(2, 5)
        assert [m.sequences for m in replica.micro_batches(2)] == [range(2, 4), range(4, 5)]
        assert replica.micro_batches(2)[1].ids_BL.tolist() == [[8]]


class TestDigest:
    IDS = tokens([1, 2, 3], [4, 5, PAD])

    def digest(self, ids: Tensor, position_ids: Tensor | None = None) -> str:
        return packed(ids, position_ids)[0].digest()

    def test_it_names_the_shape_and_is_short(self):
        assert re.fullmatch(r"\(2, 3\) tokens with digest [0-9a-f]{12}", self.digest(self.IDS))

    def test_the_same_tokens_have_the_same_digest_however_they_are_padded_and_stored(self):
        same = [
            tokens([1, 2, 3], [PAD, 4, 5]),
            tokens([PAD, 1, 2, 3], [4, 5, PAD, PAD]),
            self.IDS.int(),
            self.IDS.t().contiguous().t(),
        ]
        assert {self.digest(ids) for ids in same} == {self.digest(self.IDS)}

    @pytest.mark.parametrize(
        "other",
        [
            tokens([1, 2, 3], [4, 6, PAD]),
            tokens([2, 1, 3], [4, 5, PAD]),
            tokens([4, 5, PAD], [1, 2, 3]),
            tokens([1, 2, 3]),
            tokens([1, 2, 3], [4, 5, 0]),
        ],
        ids=["a token", "their order", "the rows' order", "fewer rows", "token 0 where there was padding"],
    )
    def test_other_tokens_have_another(self, other):
        assert self.digest(other) != self.digest(self.IDS)

    def test_other_positions_have_another(self):
        counted, moved = tokens([0, 1, 2], [0, 1, 0]), tokens([1, 2, 3], [0, 1, 0])
        assert self.digest(self.IDS, counted) == self.digest(self.IDS)
        assert self.digest(self.IDS, moved) != self.digest(self.IDS)
