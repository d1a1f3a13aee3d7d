"""Documents scored in batches into a file: the same file, whatever came before."""

import json
import math
from functools import cache

import pytest
import torch

from ds_ring.cli.documents import Document
from ds_ring.cli.scores_file import ScoresFile
from ds_ring.cli.scoring_job import Lists, batches, into_file, job_of
from ds_ring.cli.scoring_progress import ScoringProgress
from ds_ring.config import RunConfig
from ds_ring.engine.engine import Engine
from tests.helpers.launching import save
from tests.helpers.mocked_world import serve
from tests.helpers.tiny_models import VOCAB, build, gpt_neox, logits, tokens

LENGTHS = [1, 63, 0, 20, 301, 20, 7]
LAYOUTS = {"ring2": {"ring_degree": 2}, "dp2": {"dp_size": 2}, "pp2": {"pp_size": 2}}


@cache
def small_model():
    return build(gpt_neox(heads=4, layers=2))


def document(index, length, targets=None, too_long=None):
    return Document(f"d{index}", index, tokens(1, length, seed=index)[0].int(), targets, too_long)


def all_kinds():
    """Of several lengths, with targets of their own, with three a token, and one that is too long."""
    made = [document(index, length) for index, length in enumerate(LENGTHS)]
    one = torch.where(torch.arange(20) % 3 == 0, -100, tokens(1, 20, seed=99)[0]).int()
    three = torch.randint(VOCAB, (7, 3), generator=torch.Generator().manual_seed(4)).int()
    three[2], three[4, 1] = -100, -100
    made[5], made[6] = document(5, 20, one), document(6, 7, three)
    return [*made, document(7, 0, too_long="it has 9 tokens, more than 8")]


def scored(path, documents, lists, resume=False, **layout):
    """(the file's bytes, rank 0's totals, lines of progress)"""
    file, said = ScoresFile(str(path), "job", [each.id for each in documents], resume), []

    def work(engine: Engine) -> dict:
        first = engine.mesh.rank == 0
        say = said.append if first else lambda line: None
        return into_file(engine, documents, lists, file if first else None, "job", say)

    totals, *others = serve(small_model(), work, batch_size=8, micro_batch_size=2, **layout)
    assert all(other == {} for other in others)
    return path.read_bytes(), totals, said


EVERYTHING = Lists(per_token=True, top_k=4, entropy=True)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_each_document_has_its_own_figures(layout, tmp_path):
    documents = all_kinds()
    data, totals, _ = scored(tmp_path / "out.jsonl", documents, EVERYTHING, **layout)
    entries = [json.loads(line) for line in data.splitlines()]
    assert [(e["id"], e["index"]) for e in entries] == [(d.id, d.index) for d in documents]
    assert entries[-1] == {
        "id": "d7", "index": 7, "tokens": None, "scored": 0, "nll": None, "perplexity": None, "log_likelihood": None,
        "too_long": "it has 9 tokens, more than 8", "job": "job",
    }  # fmt: skip
    for each, found in zip(documents[:-1], entries, strict=False):
        ids, length = each.ids_T.long(), len(each)
        assert found["tokens"] == length
        if length < 2:
            assert (found["scored"], found["nll"], found["perplexity"], found["log_likelihood"]) == (0, None, None, 0.0)
            assert found["log_probs"] == found["top_ids"] == found["positions"] == []
            continue
        targets = each.targets if each.targets is not None else torch.cat([ids[1:], torch.tensor([-100])])
        targets = targets.long().view(length, -1)
        at = [t for t in range(length) if (targets[t] != -100).any()]
        log_probs = logits(small_model(), ids[None])[0].double().log_softmax(-1)
        want = torch.where(targets != -100, log_probs.gather(1, targets.clamp(min=0)), 0.0)
        assert found["positions"] == at
        shown = torch.tensor(found["log_probs"]).view(len(at), -1)
        torch.testing.assert_close(shown, want[at].float(), rtol=1e-5, atol=1e-5)
        assert found["scored"] == int((targets != -100).sum())
        assert found["log_likelihood"] == pytest.approx(float(want.sum()), rel=1e-5)
        assert found["nll"] == pytest.approx(-float(want.sum()) / found["scored"], rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
        assert found["top_ids"] == log_probs[at].topk(4).indices.tolist()
        entropy = -(log_probs.exp() * log_probs).sum(1)[at]
        torch.testing.assert_close(torch.tensor(found["entropies"]), entropy.float(), rtol=1e-5, atol=1e-5)
        assert torch.tensor(found["ranks"]).shape == torch.tensor(found["is_argmax"]).shape
    whole = entries[:-1]
    assert totals["tokens"] == sum(LENGTHS)
    assert totals["scored"] == sum(e["scored"] for e in whole)
    assert totals["log_likelihood"] == pytest.approx(sum(e["log_likelihood"] for e in whole))
    assert totals["perplexity"] == pytest.approx(math.exp(-totals["log_likelihood"] / totals["scored"]))
    assert (totals["documents"], totals["too_long"]) == (8, 1)


@pytest.mark.parametrize("layout", [LAYOUTS["ring2"], LAYOUTS["dp2"]], ids=["ring2", "dp2"])
def test_a_run_that_goes_on_gives_the_same_bytes(layout, tmp_path):
    """Also where it was cut within a batch: documents are scored in the same batches as before."""
    documents = all_kinds()
    whole, _, _ = scored(tmp_path / "whole.jsonl", documents, Lists(per_token=True), **layout)
    again, _, _ = scored(tmp_path / "again.jsonl", documents, Lists(per_token=True), **layout)
    assert again == whole
    lines = whole.splitlines(keepends=True)
    for kept in ([], [3], [4, 1, 7], range(8)):
        path = tmp_path / f"{len(kept)}.jsonl"
        path.write_bytes(b"".join(lines[i] for i in kept) + lines[0][:9])
        found, _, said = scored(path, documents, Lists(per_token=True), resume=True, **layout)
        assert found == whole
        assert ("8 documents have their lines already" in " ".join(said)) == bool(kept)


def test_batches_are_of_all_documents_longest_first_and_of_one_kind():
    found = batches(all_kinds(), 2)
    assert [[each.index for each in batch] for batch in found] == [[6], [4, 1], [3, 5], [0, 2]]


def test_a_job_is_of_its_documents_model_layout_and_options(tmp_path):
    folders = [save(tmp_path / name, gpt_neox(heads=2, layers=layers)) for name, layers in (("a", 1), ("b", 2))]
    config = RunConfig.load({"dtype": "fp32"}, model=str(folders[0]))
    texts = [document(0, 5), document(1, 7)]
    own = job_of(config, texts, Lists())
    assert own == job_of(RunConfig.load(config, timeout_s=7), [document(0, 5), document(1, 7)], Lists())
    others = [
        job_of(RunConfig.load(config, model=str(folders[1])), texts, Lists()),
        job_of(RunConfig.load(config, ring_degree=2), texts, Lists()),
        job_of(RunConfig.load(config, micro_batch_size=2), texts, Lists()),
        job_of(RunConfig.load(config, dtype="bf16"), texts, Lists()),
        job_of(config, texts, Lists(top_k=1)),
        job_of(config, texts[:1], Lists()),
        job_of(config, [texts[0], document(1, 7, torch.zeros(7).int())], Lists()),
        job_of(config, [texts[0], document(1, 7, torch.zeros(7, 1).int())], Lists()),
    ]
    assert len({own, *others}) == 9


def test_progress_is_counted_in_tokens():
    said, now = [], iter([0.0, 1.0, 10.0, 11.0, 20.0])
    progress = ScoringProgress(6, 4000, said.append, lambda: next(now))
    for documents, count in ((1, 500), (2, 500), (2, 1000), (1, 2000)):
        progress.advance(documents, count)
    assert said == [
        "scored 1,000 of 4,000 tokens, 3 of 6 documents, 100 tok/s, 0:00:30 left",
        "scored 4,000 of 4,000 tokens, 6 of 6 documents, 200 tok/s, in 0:00:20",
    ]
