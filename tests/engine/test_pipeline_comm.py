"""Hidden states between pipeline stages: by messages and through memory that the next stage reads, the same results."""

from __future__ import annotations

import pytest
import torch

from ds_ring.engine.engine import Engine
from ds_ring.engine.pipeline_comm import MessagePipelineComm, PulledPipelineComm, pipeline_comm
from tests.helpers.mocked_world import relative_error, serve
from tests.helpers.peer_threads import copy_engine_mesh, random_delay
from tests.helpers.tiny_models import build, gpt_neox, logits, tokens

LENGTH = 33
MASK = torch.ones(5, LENGTH, dtype=torch.long)
MASK[1, 20:] = MASK[2, 9:] = MASK[4, :30] = 0


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("layout", [{"pp_size": 2}, {"pp_size": 4}, {"pp_size": 2, "dp_size": 2}], ids=str)
def test_stages_that_read_each_others_memory(layout, micro_batch_size, monkeypatch):
    """Micro-batches of unequal lengths, so that memory grows and is reused, and peers that are early and late."""
    monkeypatch.setattr("tests.helpers.mocked_world.copy_engine_mesh", lambda: copy_engine_mesh(random_delay(0)))
    model, ids = build(gpt_neox(layers=4)), tokens(5, LENGTH)

    def work(engine: Engine) -> tuple[torch.Tensor, int]:
        for _ in range(3):
            engine.mesh.traffic.bytes_by_op.clear()
            found = engine(ids, MASK).logits
        return found, engine.mesh["pp"].traffic.bytes_by_op["exchange"]

    options = {**layout, "batch_size": 5, "micro_batch_size": micro_batch_size, "max_length": LENGTH}
    pulled, sent = (serve(model, work, wire=wire, **options) for wire in ("copy_engine", None))
    for (got, moved), (want, counted) in zip(pulled, sent, strict=True):
        assert torch.equal(got, want)
        assert moved == counted


def test_a_generation_over_stages_that_read_each_others_memory():
    model, ids = build(gpt_neox(layers=2)), tokens(3, 21).clamp(min=1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    def work(engine: Engine) -> torch.Tensor:
        return engine.generate(ids, torch.ones_like(ids), **options)

    layout = {"pp_size": 2, "batch_size": 3, "max_length": 64, "prefill_chunk": 8}
    for got in serve(model, work, wire="copy_engine", **layout):
        assert torch.equal(got, want)


def test_which_way_is_taken():
    def work(engine: Engine) -> type:
        assert relative_error(engine(ids).logits, logits(model, ids)) < 1e-5
        return type(pipeline_comm(engine.mesh["pp"], [(1, 1, 1)], torch.float32, engine.device))

    model, ids = build(gpt_neox(layers=2)), tokens(2, LENGTH)
    assert serve(model, work, wire="copy_engine", pp_size=2, batch_size=2) == [PulledPipelineComm, PulledPipelineComm]
    assert serve(model, work, pp_size=2, batch_size=2) == [MessagePipelineComm, MessagePipelineComm]
