"""Input that ranks have unlike others, or that no rank can use, is rejected by all."""

from __future__ import annotations

from functools import cache

import pytest
from transformers import PreTrainedModel

from ds_ring.engine.engine import Engine
from ds_ring.errors import DisagreementError, InputError
from tests.helpers.mocked_world import Wire, outcome, serve
from tests.helpers.tiny_models import build, gpt_neox, tokens

EIGHT = {
    "dp2_ulysses2_ring2": {"dp_size": 2, "ulysses_degree": 2, "ring_degree": 2},
    "dp2_tp2_pp2": {"dp_size": 2, "tp_size": 2, "pp_size": 2},
}


@cache
def small_model() -> PreTrainedModel:
    return build(gpt_neox(heads=4, layers=2))


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda ids: ids.flip(1), "digest"),
        (lambda ids: ids[:, 1:], r"\(1, 62\) tokens"),
        (lambda ids: ids + 1000, "token id 10.. is outside the vocabulary"),
    ],
    ids=["other tokens", "other length", "unusable tokens"],
)
@pytest.mark.parametrize("wire", ["threads", "process_groups"])
def test_other_input_on_one_rank_is_rejected_by_all(wire: Wire, alter, reason):
    ids = tokens(1, 63)

    def work(engine: Engine) -> Exception | None:
        return outcome(lambda: engine(alter(ids) if engine.mesh.rank == 2 else ids))

    errors = serve(small_model(), work, wire=wire, ring_degree=4)
    assert {type(error) for error in errors} == {DisagreementError}
    assert len({str(error) for error in errors}) == 1
    with pytest.raises(DisagreementError, match=f"ranks disagree on input_ids: rank 0 has .* rank 2 has .*{reason}"):
        raise errors[0]


def test_unusable_input_on_all_ranks_is_named_by_all():
    errors = serve(small_model(), lambda engine: outcome(lambda: engine(tokens(1, 63) + 1000)), ring_degree=4)
    assert {type(error) for error in errors} == {InputError}
    assert "outside the vocabulary of 97" in str(errors[0])


@pytest.mark.parametrize("layout", EIGHT.values(), ids=EIGHT.keys())
def test_fewer_rows_than_replicas_are_rejected_by_all(layout):
    errors = serve(
        small_model(), lambda engine: outcome(lambda: engine(tokens(1, 63))), batch_size=2, max_length=63, **layout
    )
    assert [type(e) for e in errors] == [InputError] * 8
    assert "dp_size=2" in str(errors[0])
