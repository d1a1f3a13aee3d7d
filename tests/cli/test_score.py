"""Scores of documents over replicas: in their order, however many there are and whatever their names."""

import pytest

from ds_ring.cli.documents import score
from tests.helpers.mocked_world import serve
from tests.helpers.tiny_models import build, gpt_neox, tokens


@pytest.mark.parametrize("layout", [{"dp_size": 2}, {"ring_degree": 2}], ids=str)
@pytest.mark.parametrize("lengths", [[40], [7, 33, 20], [20, 20, 5, 40]], ids=str)
def test_documents_keep_their_order_and_a_file_given_twice_is_scored_twice(layout, lengths):
    model = build(gpt_neox(heads=4, layers=2))
    texts = [tokens(1, n, seed=n)[0].tolist() for n in lengths]
    documents = [("again.txt" if n == 20 else f"{n}.txt", text) for n, text in zip(lengths, texts, strict=True)]
    alone = serve(model, lambda engine: [float(engine.token_log_likelihoods(tokens(1, n, seed=n))[0].sum())
                                         for n in lengths], ring_degree=2)[0]  # fmt: skip
    for result in serve(model, lambda engine: score(engine, documents, show_progress=False), batch_size=2, **layout):
        found = result["documents"]
        assert [(d["file"], d["tokens"]) for d in found] == [(f, len(text)) for f, text in documents]
        assert [d["log_likelihood"] for d in found] == pytest.approx(alone, rel=1e-5)
