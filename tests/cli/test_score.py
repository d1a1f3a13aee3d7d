"""Scores of text files over replicas: in their order, however many there are and whatever their names."""

import os

import pytest
import torch

from ds_ring.cli import documents, score
from ds_ring.cli.documents import Document
from ds_ring.cli.scoring_job import of_files
from ds_ring.config import RunConfig
from ds_ring.errors import InputError
from tests.helpers.launching import save
from tests.helpers.mocked_world import serve
from tests.helpers.tiny_models import build, gpt2, gpt_neox, tokens


def text(name: str, length: int, index: int = 0) -> Document:
    return Document(name, index, tokens(1, length, seed=length)[0].int())


@pytest.mark.parametrize("layout", [{"dp_size": 2}, {"ring_degree": 2}], ids=str)
@pytest.mark.parametrize("lengths", [[40], [7, 33, 20], [20, 20, 5, 40]], ids=str)
def test_documents_keep_their_order_and_a_file_given_twice_is_scored_twice(layout, lengths):
    model = build(gpt_neox(heads=4, layers=2))
    texts = [text("again.txt" if n == 20 else f"{n}.txt", n, index) for index, n in enumerate(lengths)]
    alone = serve(model, lambda engine: [float(engine.score(tokens(1, n, seed=n)).log_probs[0].sum())
                                         for n in lengths], ring_degree=2)[0]  # fmt: skip
    for result in serve(model, lambda engine: of_files(engine, texts, lambda line: None), batch_size=2, **layout):
        found = result["documents"]
        assert [(d["file"], d["tokens"]) for d in found] == [(each.id, len(each)) for each in texts]
        assert [d["log_likelihood"] for d in found] == pytest.approx(alone, rel=1e-5)


def test_documents_may_be_as_long_as_the_model_has_positions_unless_a_limit_is_given(tmp_path):
    folder = save(tmp_path / "model", gpt2(n_layer=1, vocab_size=257, n_positions=100))
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("x" * 100)
    long.write_text("x" * 101)
    config = RunConfig.load({"dtype": "fp32"}, model=str(folder))
    assert [len(each) for each in documents.read_files(config, [str(short)])] == [100]
    with pytest.raises(InputError, match="101 tokens, more than the model's max_position_embeddings=100"):
        documents.read_files(config, [str(short), str(long)])
    with pytest.raises(InputError, match="100 tokens, more than max_length=50; raise --max-length"):
        documents.read_files(RunConfig.load(config, max_length=50), [str(short)])


def test_a_layout_is_planned_for_the_documents():
    config = documents.sized(RunConfig.load({}), [text("a", 7), text("b", 40)])
    assert (config.workload.batch_size, config.workload.max_length) == (2, 40)
    # A limit on documents is none on the plan: the model may have fewer positions.
    config = documents.sized(RunConfig.load({}, max_length=90, batch_size=3), [text("a", 7)])
    assert (config.workload.batch_size, config.workload.max_length) == (3, 7)
    config = documents.sized(RunConfig.load({}), [Document("a", 0, torch.empty(0).int(), too_long="it is")])
    assert (config.workload.batch_size, config.workload.max_length) == (1, 1)


def test_a_pipe_that_several_would_read_is_refused(tmp_path):
    """Nobody writes into it: whoever opens it waits for ever."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    parser = score.make_parser()
    with pytest.raises(InputError, match="2 ranks would read it"):
        score.check(parser.parse_args(["--model", str(tmp_path), "--text", str(fifo)]), 2)
    given = ["--model", str(tmp_path), "--documents", str(fifo), "--scores", str(tmp_path / "scores.jsonl")]
    with pytest.raises(InputError, match=r"every rank reads --documents, so it must be a regular file"):
        score.check(parser.parse_args(given))
