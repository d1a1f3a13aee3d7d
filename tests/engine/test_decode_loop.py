"""Steps of a generation that are captured once and done again: what holds without a GPU, and on one."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from torch import Tensor, nn

import ds_ring
from ds_ring.engine.engine import Engine
from ds_ring.errors import DsRingError
from ds_ring.kv_cache import shard
from tests.helpers.marks import ON_A_GPU
from tests.helpers.mocked_world import serve
from tests.helpers.tiny_models import build, gpt_neox, llama_gqa, mistral, tokens

IDS = tokens(3, 21).clamp(min=1)
MASK = torch.ones_like(IDS)
MASK[1, :9] = MASK[2, :3] = 0
OPTIONS = {
    "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip


@pytest.fixture
def little_room(monkeypatch):
    """The cache moves every few tokens."""
    monkeypatch.setattr(shard, "LOOK_AHEAD", 6)
    monkeypatch.setattr(shard, "GROWTH", 1.2)
    monkeypatch.setattr(shard, "SMALLEST", 1)


class Recorder:
    """Stands for a capture: what it is given may be done again until the cache moves."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run):
        self.captured += 1

        def replay() -> Tensor:
            self.replayed += 1
            return run()

        return replay


@pytest.mark.parametrize("layout", [{}, {"ring_degree": 3}], ids=["single", "ring3"])
def test_a_step_is_captured_again_only_when_the_cache_moves(little_room, layout):
    def work(engine: Engine) -> tuple[Tensor, int, int, int]:
        recorder = engine.runner.capture = Recorder()
        found = engine.generate(IDS, MASK, max_new_tokens=60, **OPTIONS)
        return found.sequences, recorder.captured, recorder.replayed, found.past_key_values.cache_shard.moves

    model = build(llama_gqa())
    with torch.no_grad():
        want = model.generate(IDS, attention_mask=MASK, max_new_tokens=60, **OPTIONS).sequences
    for sequences, captured, replayed, moves in serve(model, work, **layout):
        assert torch.equal(sequences, want)
        growths = moves // (model.config.num_hidden_layers + 1)  # positions, and each layer's keys and values
        plain = 59 - replayed
        assert 3 < captured <= plain <= growths < 15


def test_a_generation_leaves_no_cache_for_the_garbage_collector():
    def work(engine: Engine) -> bool:
        engine.generate(IDS, MASK, max_new_tokens=5, **OPTIONS)  # what is found out once may leave circles
        gc.collect()
        gc.disable()
        try:
            found = engine.generate(IDS, MASK, max_new_tokens=5, **OPTIONS)
            held = weakref.ref(found.past_key_values.cache_shard)
            del found
            return held() is None
        finally:
            gc.enable()

    assert serve(build(llama_gqa()), work) == [True]


class Asks(nn.Module):
    """A layer that looks at what a tensor holds, as a router of experts may."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.abs().max()) >= 0 else x


def on_gpu(config, decode_graph, asks=False):
    model = build(config).half().cuda()
    if asks:
        layer = model.model.layers[1]
        layer.mlp = Asks(layer.mlp)
    return ds_ring.init_inference(model, config={"dtype": "fp16", "ds_ring": {"decode_graph": decode_graph}})


class TestOnAGPU:
    pytestmark = ON_A_GPU

    @pytest.mark.parametrize("config", [llama_gqa, gpt_neox, mistral], ids=lambda config: config.__name__)
    def test_graphs_give_the_same_bits(self, little_room, config):
        plain, graph = (on_gpu(config(), name).generate(IDS, MASK, max_new_tokens=60, **OPTIONS)
                        for name in ("off", "auto"))  # fmt: skip
        assert torch.equal(plain.sequences, graph.sequences)
        for one, other in zip(plain.logits, graph.logits, strict=True):
            assert torch.equal(one, other)

    def test_graphs_are_replayed(self, monkeypatch):
        replays = []
        replay = torch.cuda.CUDAGraph.replay
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(replay(graph)))
        on_gpu(llama_gqa(), "auto").generate(IDS, MASK, max_new_tokens=20, **OPTIONS)
        assert len(replays) == 18  # the prompt gives the first token; one step is done plainly

    def test_a_model_that_asks_the_device_decodes_without_one_and_says_so(self, caplog):
        want = on_gpu(llama_gqa(), "off").generate(IDS, MASK, max_new_tokens=12, **OPTIONS)
        asking = on_gpu(llama_gqa(), "auto", asks=True)
        with caplog.at_level(logging.WARNING, "ds_ring"):
            for _ in range(2):
                got = asking.generate(IDS, MASK, max_new_tokens=12, **OPTIONS)
        assert torch.equal(got.sequences, want.sequences)
        assert [r.message.split(":")[0] for r in caplog.records].count("decoding without a CUDA graph") == 1
        with pytest.raises(
            DsRingError, match=r"LlamaForCausalLM cannot be captured in a CUDA graph: .*decode_graph=off"
        ):
            on_gpu(llama_gqa(), "on", asks=True).generate(IDS, MASK, max_new_tokens=12, **OPTIONS)

    def test_a_thousand_generations_leave_no_memory_behind(self):
        """Each captures a graph of its own; prompts of ten lengths in turn."""
        engine, held = on_gpu(llama_gqa(), "on"), {}
        for number in range(1, 1001):
            ids = IDS[:, : 8 + number % 10]
            engine.generate(ids, torch.ones_like(ids), max_new_tokens=5, **OPTIONS)
            if number in (10, 1000):
                gc.collect()
                torch.cuda.synchronize()
                held[number] = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        for early, late in zip(held[10], held[1000], strict=True):
            assert abs(late - early) <= 0.01 * early, held
