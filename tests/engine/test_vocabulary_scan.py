"""The scan over columns of the vocabulary, against log_softmax over all of them in fp64."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_ring.engine.vocabulary_scan import COLUMN_ELEMENTS, Wanted, scan


def random(tokens, vocabulary, seed, size=5.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(tokens, vocabulary, generator=generator)).to(dtype)


def scanned(logits, targets, wanted=Wanted(), columns=7):  # noqa: B008
    with patch.dict(COLUMN_ELEMENTS, cpu=columns * len(logits)):
        return scan(logits, targets, wanted)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5), st.integers(1, 40), st.integers(1, 4), st.integers(1, 50), st.integers(1, 40),
    st.sampled_from([1.0, 0.3, 4.0]), st.sampled_from([0.01, 5.0, 1e4]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 999),
)  # fmt: skip
def test_every_figure_is_that_of_all_columns(
    tokens, vocabulary, targets, columns, top_k, temperature, size, dtype, seed
):
    logits = random(tokens, vocabulary, seed, size, dtype)
    ids = torch.randint(-1, vocabulary, (tokens, targets), generator=torch.Generator().manual_seed(seed))
    ids = torch.where(ids < 0, -100, ids)
    top_k = min(top_k, vocabulary)
    found = scanned(logits, ids, Wanted(top_k, True, temperature), columns)
    want = (logits.double() / temperature).log_softmax(1)
    given_ids, tolerance = ids != -100, {"rtol": 1e-5, "atol": 1e-5}

    def close(got, wanted):
        torch.testing.assert_close(got.double(), wanted, **tolerance)

    close(found.log_probs_MC, torch.where(given_ids, want.gather(1, ids.clamp(min=0)), 0.0))
    close(found.entropies_M, torch.special.entr(want.exp()).sum(1))
    own = logits.gather(1, ids.clamp(min=0))
    assert torch.equal(found.ranks_MC, torch.where(given_ids, 1 + (logits[:, None] > own[..., None]).sum(2), 0))
    # Equal logits: the lowest id is the likeliest, and which of them are among the top is left open.
    assert torch.equal(found.is_argmax_MC, given_ids & (ids == logits.float().argmax(1, keepdim=True)))
    close(found.top_log_probs_MK, want.topk(top_k).values)
    close(found.top_log_probs_MK, want.gather(1, found.top_ids_MK))
    assert all(len(set(row)) == top_k for row in found.top_ids_MK.tolist())
    assert bool(found.finite)


def test_of_equal_logits_the_first_is_the_likeliest():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0]])
    found = scanned(logits, torch.tensor([[1, 3, 4, 2, 0]]), columns=2)
    assert found.ranks_MC.tolist() == [[1, 1, 1, 4, 5]]
    assert found.is_argmax_MC.tolist() == [[True, False, False, False, False]]


def test_logits_that_a_model_masks_weigh_nothing():
    """As minus infinity or the lowest number, also where whole blocks of columns are."""
    logits = random(2, 30, seed=1)
    for lowest in (-float("inf"), torch.finfo(torch.float32).min):
        masked = logits.clone()
        masked[:, :15] = masked[:, 20:25] = lowest
        found = scanned(masked, torch.tensor([[16], [29]]), Wanted(2, True), columns=5)
        kept = torch.cat([logits[:, 15:20], logits[:, 25:]], dim=1).double().log_softmax(1)
        torch.testing.assert_close(found.log_probs_MC.double(), kept[[0, 1], [1, 9]][:, None], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            found.entropies_M.double(), torch.special.entr(kept.exp()).sum(1), rtol=1e-5, atol=1e-5
        )
        assert bool(found.finite)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 8, 19])
def test_what_is_not_finite_is_told(value, column):
    logits = random(3, 20, seed=2)
    logits[1, column] = value
    assert not bool(scanned(logits, torch.tensor([[3], [4], [5]])).finite)
    logits[1] = -float("inf")
    assert not bool(scanned(logits, torch.tensor([[3], [4], [5]])).finite)
