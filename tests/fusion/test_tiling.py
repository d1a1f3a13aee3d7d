"""Layers in tiles of tokens: the same results, and no more memory than the closed form says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ds_ring.attention import ring, segments
from ds_ring.attention.backends import eager
from ds_ring.config import RunConfig
from ds_ring.engine.engine import Engine
from ds_ring.fusion import tiling
from ds_ring.fusion.fuse import Fusion
from ds_ring.fusion.tiling import TiledTail, token_tiles
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.dims import model_dims
from ds_ring.kernels import attention512
from ds_ring.planning.memory_estimate import peak_bytes
from tests.helpers.live_bytes import peak_of
from tests.helpers.mocked_world import relative_error, serve
from tests.helpers.tiny_models import ARCHITECTURES, build, gpt_neox, llama_gqa, logits, mixtral, tokens

TOLERANCE = 1e-5
LENGTH = 61


@given(batch=st.integers(1, 9), length=st.integers(1, 90), limit=st.integers(0, 200))
def test_tiles_cover_every_token_once_in_equal_sizes(batch, length, limit):
    x = torch.arange(batch * length).view(batch, length)
    parts = [x[tile] for tile in token_tiles(batch, length, limit)]
    assert torch.equal(torch.cat([part.flatten() for part in parts]), x.flatten())
    assert all(part.is_contiguous() for part in parts)
    if limit:
        sizes = [part.numel() for part in parts]
        assert max(sizes) <= limit
        # As equal as whole sequences, or parts of one, can be.
        assert max(sizes) - min(sizes) <= (length if length <= limit else 1)
    else:
        assert len(parts) == 1


LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "ring2": {"ring_degree": 2, "wire": "copy_engine"},
    "ring3_pass_kv": {"ring_degree": 3, "ring_variant": "pass_kv"},
    "ulysses2": {"ulysses_degree": 2},
    "tp2": {"tp_size": 2},
    "pp2": {"pp_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(("micro", "block_tokens"), [(1, 7), (2, 30), (2, 70)])
def test_every_layout_gives_the_same_in_tiles(layout, micro, block_tokens):
    """Parts of a sequence, and whole sequences at a time."""
    model, ids = build(gpt_neox(heads=4, layers=2)), tokens(4, LENGTH)
    options = {"batch_size": 4, "micro_batch_size": micro, "block_tokens": block_tokens, **layout}
    for got in serve(model, lambda engine: engine(ids).logits, **options):
        assert relative_error(got, logits(model, ids)) < TOLERANCE


@pytest.mark.parametrize("ring_degree", [1, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_the_same_in_tiles(name, ring_degree):
    model, ids = build(ARCHITECTURES[name]()), tokens(2, LENGTH)
    for got in serve(model, lambda engine: engine(ids).logits, block_tokens=8, batch_size=2, ring_degree=ring_degree):
        assert relative_error(got, logits(model, ids)) < TOLERANCE


@pytest.mark.parametrize("layout", [{}, {"ring_degree": 2}, {"ulysses_degree": 2}], ids=str)
def test_a_prompt_in_tiles_fills_the_cache(layout):
    model, ids = build(gpt_neox(heads=4, layers=2)), tokens(2, 21)
    want = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    options = {"max_length": 64, "batch_size": 2, "block_tokens": 5, **layout}
    for got in serve(model, lambda e: e.generate(ids, max_new_tokens=4, do_sample=False), **options):
        assert torch.equal(got, want)


def test_usual_shapes_run_as_without_tiles(monkeypatch):
    """One tile: the graph gets the tensors themselves, and its result is returned as it is."""
    seen: list[bool] = []
    in_tiles = tiling.in_tiles

    def watched(graph: Callable[..., Tensor], inputs: Any, tiles: Any, over: Any = None) -> Tensor:
        seen.append(tiles == [tiling.WHOLE])
        return in_tiles(graph, inputs, tiles, over)

    monkeypatch.setattr(tiling, "in_tiles", watched)
    model, ids = build(gpt_neox(heads=4, layers=2)), tokens(2, LENGTH)
    want = serve(model, lambda engine: engine(ids).logits, block_tokens=0)[0]
    assert seen == []
    got = serve(model, lambda engine: engine(ids).logits)[0]
    assert seen == [True] * 4  # two layers, two micro-batches
    assert torch.equal(got, want)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_layers_input_is_written_over_only_where_that_was_allowed(in_place):
    model = build(gpt_neox(heads=4, layers=2))
    Fusion(Decoder.of(model), tile_tokens=8, in_place=in_place)
    layer = Decoder.of(model).layers[0]
    x, positions = torch.randn(1, 20, 32), torch.arange(20)[None]
    with torch.inference_mode():
        embeddings = model.gpt_neox.rotary_emb(x, positions)
        given = x.clone()
        got = layer(given, position_embeddings=embeddings)
        want = build(gpt_neox(heads=4, layers=2)).gpt_neox.layers[0](x, position_embeddings=embeddings)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(given, got if in_place else x)
    assert (got is given) == in_place


def test_experts_stay_whole():
    """A mixture of experts is not known to treat tokens one by one, and after it there is only a sum."""
    model = build(mixtral())
    fusion = Fusion(Decoder.of(model), tile_tokens=8)
    logits(model, tokens(1, LENGTH))
    assert fusion.done["AddNorm"] == 3
    assert fusion.done["token tiles"] == 0


@pytest.fixture
def attention_without_memory(monkeypatch):
    """Results of the right shape and no other memory, as from a kernel: plain PyTorch would hold scores."""

    def result(q: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q, dtype=dtype), q.new_zeros(q.shape[0], q.shape[2], q.shape[1])

    monkeypatch.setattr(eager, "attention", lambda q, k, v, out_dtype=None, **_: result(q, out_dtype))
    monkeypatch.setattr(attention512, "attention512", lambda q, *_, **__: result(q))
    monkeypatch.setattr(ring, "takes_segments", lambda *_: True)
    monkeypatch.setattr(segments, "_one_launch", lambda *_: True)


@pytest.mark.parametrize("layout", [{}, {"ring_degree": 2, "gather_limit_mib": 0}], ids=["alone", "ring2"])
@pytest.mark.parametrize("config", [gpt_neox, llama_gqa])
@pytest.mark.usefixtures("attention_without_memory")
def test_memory_is_what_the_closed_form_says_and_no_intermediate_is_whole(config, layout, monkeypatch):
    """Two layers, one of which holds the other's result. A ring of two gathers, in one buffer, as in long sequences."""
    length, tile_tokens = 2048, 64
    monkeypatch.setattr("ds_ring.planning.memory_estimate.LARGE", 0)
    monkeypatch.setattr("ds_ring.planning.memory_estimate.HEAD_DIM", 8)
    model, ids = build(config(num_hidden_layers=2)), tokens(1, length)
    dims = model_dims(model.config)
    whole = length * dims.intermediate_size * 4

    def work(engine: Engine) -> tuple[int, int]:
        engine(ids, logits_to_keep=1)  # traces the layers
        live = peak_of(lambda: engine(ids, logits_to_keep=1))
        assert live.now < whole / 20, "something outlives its forward"
        return live.peak, live.largest

    for block_tokens in (tile_tokens, 0):
        options = {"max_length": length, "block_tokens": block_tokens, **layout}
        ranks = serve(model, work, **options)
        whole_on_rank = whole // len(ranks)
        peak, largest = max(ranks)  # a ring's first rank sees all of the other's keys
        if block_tokens:
            run = RunConfig.load({"dtype": "fp32"}, **options)
            assert largest < whole_on_rank
            assert peak == pytest.approx(peak_bytes(run, dims, 0, 1), rel=0.1)
            tiled = peak
        else:
            assert largest >= whole_on_rank
            assert tiled < 0.75 * peak


@pytest.mark.parametrize(
    "layout", [{"tp_size": 2}, {"ulysses_degree": 2}, {"ulysses_degree": 2, "ring_degree": 2}], ids=str
)
@pytest.mark.usefixtures("attention_without_memory")
def test_memory_in_tiles_is_what_the_closed_form_says_in_other_layouts_too(layout, monkeypatch):
    """With one buffer for what a ring shares, as with long sequences."""
    monkeypatch.setattr("ds_ring.planning.memory_estimate.LARGE", 0)
    model, ids = build(gpt_neox(num_hidden_layers=2)), tokens(1, length := 2048)

    def work(engine: Engine) -> int:
        engine(ids, logits_to_keep=1)  # traces the layers
        return peak_of(lambda: engine(ids, logits_to_keep=1)).peak

    options = {"max_length": length, "block_tokens": 64, **layout}
    run = RunConfig.load({"dtype": "fp32"}, **options)
    predicted = peak_bytes(run, model_dims(model.config), 0, 1)
    assert max(serve(model, work, **options)) == pytest.approx(predicted, rel=0.03)


@pytest.mark.parametrize(("ring_degree", "variant", "gathers"), [(2, "auto", 2), (2, "pass_kv", 0), (3, "auto", 0)])
def test_a_ring_of_two_gathers_in_one_launch_where_k_and_v_exceed_the_limit(ring_degree, variant, gathers, monkeypatch):
    taken: list[str] = []
    gather_kv = ring.gather_kv
    monkeypatch.setattr(ring, "takes_segments", lambda *_: True)
    monkeypatch.setattr(ring, "gather_kv", lambda *args: taken.append("gather_kv") or gather_kv(*args))
    model, ids = build(gpt_neox(heads=4, layers=1)), tokens(1, LENGTH)
    options = {"ring_degree": ring_degree, "ring_variant": variant, "gather_limit_mib": 0}
    for got in serve(model, lambda engine: engine(ids).logits, **options):
        assert relative_error(got, logits(model, ids)) < TOLERANCE
    assert len(taken) == gathers


def test_a_tensor_that_is_no_batch_of_sequences_is_one_tile():
    part = TiledTail(torch.nn.Identity(), 4, None)
    x = torch.randn(9, 3)
    assert part(x) is x
