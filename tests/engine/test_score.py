"""Scores of given tokens in every layout, against the unsharded model's log_softmax over all its logits."""

import re
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from deepspeed.module_inject.layers import LmHeadLinearAllreduce
from torch import Tensor
from transformers import PreTrainedModel

from ds_ring.engine import scoring
from ds_ring.engine.engine import Engine
from ds_ring.engine.model_runner import Shard
from ds_ring.engine.scoring import score_tokens
from ds_ring.engine.token_scores import TokenScores
from ds_ring.engine.vocabulary_scan import COLUMN_ELEMENTS, Wanted
from ds_ring.errors import DisagreementError, InputError
from ds_ring.hf.decoder import Decoder
from ds_ring.transport.solo import SoloTransport
from tests.helpers.live_bytes import peak_of
from tests.helpers.mocked_world import outcome, serve
from tests.helpers.tiny_models import ARCHITECTURES, VOCAB, build, gpt_neox, logits, tokens

WITHIN = 1e-5
LAYOUTS: dict[str, dict[str, Any]] = {
    "one_rank": {},
    "ring3": {"ring_degree": 3},
    "ulysses2": {"ulysses_degree": 2},
    "dp2_ulysses2_ring2": {"dp_size": 2, "ulysses_degree": 2, "ring_degree": 2},
    "tp2_pp2": {"tp_size": 2, "pp_size": 2},
    "tp4": {"tp_size": 4},
    "dp2": {"dp_size": 2},
}
LENGTHS = [1, 63, 1001]


@dataclass
class Want:
    """Of one sequence, from all its logits in fp64."""

    logits_LV: Tensor

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        return (self.logits_LV.double() / temperature).log_softmax(-1)

    def rank(self, ids: Tensor) -> Tensor:
        """[L, A] of targets [L, A]."""
        own = self.logits_LV.gather(1, ids)
        return 1 + (self.logits_LV[:, None] > own[..., None]).sum(-1)

    def entropy(self, temperature: float = 1.0) -> Tensor:
        log_probs = self.log_probs(temperature)
        return -(log_probs.exp() * log_probs).sum(-1)


@cache
def small_model() -> PreTrainedModel:
    model = build(gpt_neox(heads=4, layers=2))
    with torch.no_grad():  # logits of a usual size, some units apart
        model.get_output_embeddings().weight.mul_(0.5)
    return model


@cache
def wanted(length: int, seed: int) -> Want:
    return Want(logits(small_model(), tokens(1, length, seed))[0])


@pytest.fixture
def small_blocks(monkeypatch):
    """Three tokens of logits at a time, of which 40 columns are looked at."""
    monkeypatch.setattr("ds_ring.engine.scoring.LOGIT_ELEMENTS", 3 * VOCAB + 5)
    monkeypatch.setitem(COLUMN_ELEMENTS, "cpu", 3 * 40)


def batch_of(lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    """Ids under padding must not count, and are no tokens at all."""
    columns = max(lengths) + 2
    ids, mask = torch.full((len(lengths), columns), 5), torch.zeros(len(lengths), columns, dtype=torch.long)
    for sequence, length in enumerate(lengths):
        where = slice(columns - length, columns) if side == "left" else slice(0, length)
        if length:
            ids[sequence, where], mask[sequence, where] = tokens(1, length, seed=sequence)[0], 1
    return ids, mask


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=WITHIN, atol=WITHIN)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_next_tokens_are_scored_as_by_the_unsharded_model(layout, side, small_blocks):
    lengths = [*LENGTHS, 0]
    ids, mask = batch_of(lengths, side)

    def work(engine: Engine) -> tuple[TokenScores, TokenScores]:
        def score() -> TokenScores:
            return engine.score(ids, mask, top_k=5, entropy=True)

        return score(), score()

    for found, again in serve(small_model(), work, batch_size=4, micro_batch_size=2, **layout):
        for sequence, length in enumerate(lengths):
            scored = max(0, length - 1)
            assert found.positions[sequence].tolist() == list(range(scored))
            shape = (scored,)
            assert found.log_probs[sequence].dtype == found.entropies[sequence].dtype == torch.float32
            assert found.log_probs[sequence].shape == found.ranks[sequence].shape == shape
            assert found.top_ids[sequence].shape == found.top_log_probs[sequence].shape == (scored, 5)
            if not scored:
                continue
            want, following = wanted(length, sequence), tokens(1, length, seed=sequence)[0, 1:, None]
            log_probs = want.log_probs()[:-1]
            close(found.log_probs[sequence], log_probs.gather(1, following)[:, 0])
            close(found.entropies[sequence], want.entropy()[:-1])
            top = log_probs.topk(5)
            close(found.top_log_probs[sequence], top.values)
            assert torch.equal(found.top_ids[sequence], top.indices)
            assert torch.equal(found.ranks[sequence], want.rank(torch.cat([following, following[-1:]]))[:-1, 0])
            assert torch.equal(found.is_argmax[sequence], log_probs.argmax(1) == following[:, 0])
        for name, values in vars(found).items():
            same = [torch.equal(a, b) for a, b in zip(values or [], getattr(again, name) or [], strict=True)]
            assert all(same), f"{name} of a repeated call"
        assert found.hidden_states is None


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_given_targets_are_scored_where_they_stand(layout, small_blocks):
    """Three candidates a token, some skipped, at a temperature, from a start on; and the hidden states beside them."""
    lengths, start, temperature = [40, 7, 63], 4, 0.7
    ids, mask = batch_of(lengths, "left")
    generator = torch.Generator().manual_seed(9)
    targets = torch.randint(VOCAB, (*ids.shape, 3), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.5] = -100
    targets[mask == 0] = 10**6  # padding is not looked at
    model = small_model()
    with torch.inference_mode():
        hidden = [model.gpt_neox(tokens(1, n, seed=i)).last_hidden_state[0] for i, n in enumerate(lengths)]

    def work(engine: Engine) -> TokenScores:
        return engine.score(
            ids, mask, target_ids=targets, start=start, temperature=temperature, hidden_states=True
        )  # fmt: skip

    for found in serve(model, work, batch_size=3, micro_batch_size=2, **layout):
        assert found.top_ids is found.top_log_probs is found.entropies is None
        for sequence, length in enumerate(lengths):
            own = targets[sequence][mask[sequence] == 1]
            given = own != -100
            at = [t for t in range(start, length) if given[t].any()]
            assert found.positions[sequence].tolist() == at
            want = wanted(length, sequence)
            log_probs = want.log_probs(temperature).gather(1, own.clamp(min=0))
            close(found.log_probs[sequence], torch.where(given, log_probs, 0.0)[at])
            ranks = torch.where(given, want.rank(own.clamp(min=0)), 0)
            assert torch.equal(found.ranks[sequence], ranks[at])
            is_argmax = given & (own == want.logits_LV.argmax(1, keepdim=True))
            assert torch.equal(found.is_argmax[sequence], is_argmax[at])
            torch.testing.assert_close(found.hidden_states[sequence], hidden[sequence][at], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_head_is_the_models_own(name, small_blocks):
    """Tied, with a bias, scaled, soft-capped: what a model does to its logits is done."""
    model, ids = build(ARCHITECTURES[name]()), tokens(1, 33)
    want = Want(logits(model, ids)[0])
    for found in serve(model, lambda engine: engine.score(ids, entropy=True), ring_degree=2):
        close(found.log_probs[0], want.log_probs()[:-1].gather(1, ids[0, 1:, None])[:, 0])
        close(found.entropies[0], want.entropy()[:-1])


def test_documents_score_alone_what_they_score_together():
    lengths = [5, 63, 1, 40, 99]
    ids, mask = batch_of(lengths, "right")

    def work(engine: Engine) -> tuple[TokenScores, list[TokenScores]]:
        alone = [engine.score(ids[i : i + 1, :n]) for i, n in enumerate(lengths)]
        return engine.score(ids, mask), alone

    for layout in ({"ring_degree": 2}, {"dp_size": 2}, {"tp_size": 2}):
        for together, alone in serve(small_model(), work, batch_size=5, micro_batch_size=3, **layout):
            for sequence, one in enumerate(alone):
                close(together.log_probs[sequence], one.log_probs[0])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_models_have_their_own_logits_in_a_softmax_of_fp32(dtype):
    model, ids = build(gpt_neox(heads=4, layers=2)), tokens(2, 41)

    def work(engine: Engine) -> tuple[TokenScores, Tensor]:
        return engine.score(ids, entropy=True), engine(ids).logits

    for found, own in serve(model, work, dtype=dtype, batch_size=2, ring_degree=2):
        assert own.dtype in (torch.float16, torch.bfloat16)
        for sequence in range(2):
            want = Want(own[sequence])
            close(found.log_probs[sequence], want.log_probs()[:-1].gather(1, ids[sequence, 1:, None])[:, 0])
            close(found.entropies[sequence], want.entropy()[:-1])


def test_tensor_parallel_ranks_share_the_tokens(monkeypatch):
    """Each looks at the logits of its own, and gets no sums of others'."""
    seen, summed, scan, own = [], [], scoring.scan, LmHeadLinearAllreduce.forward
    monkeypatch.setattr(scoring, "scan", lambda logits, *given: seen.append(logits.shape) or scan(logits, *given))
    monkeypatch.setattr(LmHeadLinearAllreduce, "forward", lambda head, x: summed.append(x.shape[1]) or own(head, x))
    ids = tokens(1, 42)
    results = serve(small_model(), lambda engine: engine.score(ids).log_probs[0], tp_size=2)
    assert seen == [(21, VOCAB)] * 2
    assert summed == [0] * 2, "tokens of the forward before"
    assert torch.equal(*results)
    close(results[0], wanted(42, 0).log_probs()[:-1].gather(1, ids[0, 1:, None])[:, 0])


IDS = tokens(2, 9)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "target": ({"target_ids": torch.where(IDS[1, 3] == IDS, VOCAB, IDS)}, rf"is {VOCAB}, outside the vocabulary of 97"),
    "negative": ({"target_ids": IDS - 98}, r"target_ids\[0, 0\] is -\d+, outside the vocabulary of 97; -100 leaves"),
    "shape": ({"target_ids": IDS[:, 1:]}, r"of shape \(2, 9\), not \(2, 8\)$"),
    "floats": ({"target_ids": IDS.float()}, r"target_ids must be whole numbers, not torch.float32"),
    "candidates": ({"target_ids": IDS[..., None][..., :0]}, r"\(2, 9, 0\) hold no candidate"),
    "start": ({"start": 9}, "start=9 is beyond the longest sequence, which has 9 tokens; lower it"),
    "before": ({"start": -1}, "start=-1 must be a whole number of at least 0"),
    "half": ({"start": 0.5}, "start=0.5 must be a whole number of at least 0"),
    "list": ({"target_ids": IDS.tolist()}, r"target_ids must be a tensor \[batch, length\], not a list; torch.tensor"),
    "bool": ({"target_ids": IDS > 0}, "target_ids must be whole numbers, not torch.bool"),
    "many": ({"top_k": 2.0}, "top_k=2.0 must be a whole number"),
    "words": ({"temperature": "1"}, "temperature='1' must be a number above 0"),
    "top_k": ({"top_k": 98}, "top_k=98 must be from 0 to the vocabulary's size, 97"),
    "cold": ({"temperature": 0.0}, "temperature=0.0 must be a number above 0"),
    "nan": ({"temperature": float("nan")}, "temperature=nan must be a number above 0"),
    "mask": ({"attention_mask": IDS[:, 1:]}, r"attention_mask has shape \(2, 8\), input_ids \(2, 9\)"),
}


@pytest.mark.parametrize(("options", "says"), BAD.values(), ids=BAD)
def test_what_cannot_be_scored_is_refused_before_any_work(options, says):
    def work(engine: Engine) -> Exception | None:
        engine.runner.run_micro_batches = None  # nothing runs
        return outcome(lambda: engine.score(IDS, **options))

    for error in serve(small_model(), work, ring_degree=2):
        assert isinstance(error, InputError)
        assert re.search(says, str(error)), error


@pytest.mark.parametrize("what", ["targets", "refused", "top_k"])
def test_ranks_that_disagree_are_told_so(what):
    def work(engine: Engine) -> Exception | None:
        last = engine.mesh.rank == 1
        targets = torch.full_like(IDS, VOCAB if what == "refused" else 3) if last else IDS
        return outcome(lambda: engine.score(IDS, target_ids=None if what == "top_k" else targets, top_k=int(last)))

    for error in serve(small_model(), work, ring_degree=2):
        assert isinstance(error, DisagreementError)
        assert f"ranks disagree on {'options' if what == 'top_k' else 'input_ids'}: rank 0" in str(error)


@pytest.mark.parametrize("wanted_too", [Wanted(), Wanted(top_k=4, entropy=True, temperature=0.5)], ids=["plain", "all"])
@pytest.mark.parametrize("targets", [1, 3])
def test_memory_is_that_of_a_block_whatever_the_length_and_the_vocabulary(wanted_too, targets, monkeypatch):
    logit_elements, column_elements, few = 40_000, 5_000, 20_000
    monkeypatch.setattr("ds_ring.engine.scoring.LOGIT_ELEMENTS", logit_elements)
    monkeypatch.setitem(COLUMN_ELEMENTS, "cpu", column_elements)
    peaks = {}
    for length, vocabulary in ((300, 1000), (3000, 1000), (300, 10_000)):
        decoder = Decoder.of(build(gpt_neox(heads=1, layers=1, vocab_size=vocabulary)))
        hidden, at = torch.randn(length, 8), torch.arange(length)
        ids = torch.randint(vocabulary, (length, targets))

        def work(given: tuple[Any, ...] = (decoder, hidden, at, ids, wanted_too)) -> None:
            for words, _ in score_tokens(*given, SoloTransport()):
                assert len(words) <= logit_elements // given[0].model.config.vocab_size

        peaks[length, vocabulary] = peak_of(work).peak
    # One block of logits, and of some of its columns at most three fp32 values and, of several targets, a whole number.
    assert max(peaks.values()) < 4 * (logit_elements + 5 * column_elements) + few, peaks


def test_hidden_states_are_let_go_as_each_micro_batch_ends():
    ids, alive, most = tokens(6, 33), weakref.WeakSet(), []

    def work(engine: Engine) -> None:
        finish = engine.runner._run_micro_batch

        def watched(*args: Any) -> Any:
            scorer = args[-1]

            def told(shard: Shard) -> Shard:
                alive.add(shard.hidden_BTd)
                most.append(len(alive))
                return scorer(shard)

            return finish(*args[:-1], told)

        engine.runner._run_micro_batch = watched
        engine.score(ids)

    serve(small_model(), work, batch_size=6, micro_batch_size=1)
    assert most == [1] * 6
