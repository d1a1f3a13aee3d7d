"""``prefill_only``: the last layer for each sequence's last token alone gives what the whole layer gives."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ds_ring.engine.engine import Engine
from ds_ring.errors import NumericsError, UnsupportedModelError
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.last_layer import LastTokens, last_tokens_only
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.transport.solo import SoloTransport
from tests.helpers.mocked_world import outcome, relative_error, serve
from tests.helpers.tiny_models import build, gemma2, gpt_neox, llama_gqa, logits, mistral, tokens

LENGTH = 101
TOLERANCE = 1e-5

LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "ring4": {"ring_degree": 4},
    "ring3_contiguous": {"ring_degree": 3, "ring_impl": "contiguous"},
    "ulysses2_ring2": {"ulysses_degree": 2, "ring_degree": 2},
    "tp2_pp2": {"tp_size": 2, "pp_size": 2},
    "dp2_ring2": {"dp_size": 2, "ring_degree": 2},
}
by_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@cache
def small_model() -> PreTrainedModel:
    return build(gpt_neox(heads=4, layers=2))


@pytest.mark.parametrize("fusion", ["auto", "none"])
@pytest.mark.parametrize("lengths", [[101, 37, 1, 80, 64], [5, 5, 5], [2, 1]], ids=str)
@by_layout
def test_unequal_lengths(layout, lengths, fusion):
    columns = max(lengths) + 2
    mask = torch.zeros(len(lengths), columns, dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, columns - n if row % 2 else 0 : columns if row % 2 else n] = True
    ids = tokens(len(lengths), columns)

    def work(engine: Engine) -> Tensor:
        return engine.next_token_logits(ids, mask)

    results = serve(
        small_model(), work, batch_size=len(lengths), micro_batch_size=2, fusion=fusion, max_length=columns, **layout
    )
    want = torch.stack([logits(small_model(), ids[row : row + 1, mask[row]])[0, -1] for row in range(len(lengths))])
    for got in results:
        assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("config", [mistral, gemma2], ids=["mistral", "gemma2"])
@pytest.mark.parametrize("layout", [{"ring_degree": 4}, {"ulysses_degree": 2, "ring_degree": 2}], ids=str)
@pytest.mark.parametrize("length", [9, 24, 25, 101])
def test_windows_cut_what_the_last_token_sees(config, layout, length):
    """Every other layer of Gemma 2 has a window: of one layer the last has one."""
    model, ids = build(config(num_hidden_layers=1)), tokens(2, length)
    for got in serve(model, lambda engine: engine.next_token_logits(ids), batch_size=2, micro_batch_size=2, **layout):
        assert relative_error(got, logits(model, ids)[:, -1]) < TOLERANCE


@by_layout
def test_it_leaves_the_engine_as_it_was(layout):
    ids = tokens(2, 63)

    def work(engine: Engine) -> list[Tensor]:
        forward = vars(engine.runner.decoder.layers[-1])["forward"]
        before = engine(ids).logits
        engine.next_token_logits(ids)
        assert vars(engine.runner.decoder.layers[-1])["forward"] is forward
        return [before, engine(ids).logits]

    for before, after in serve(small_model(), work, batch_size=2, **layout):
        assert torch.equal(before, after)


@by_layout
def test_the_last_layer_sees_its_mlp_run_for_one_token_a_sequence(layout):
    ids, seen = tokens(2, 63), []

    def work(engine: Engine) -> list[Tensor | None]:
        layer = engine.runner.decoder.layers[-1]
        layer.attention.dense.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[:2]))
        batch, _ = engine.prepare(ids, None, None)
        return engine.prefill_only(batch)

    results = serve(small_model(), work, batch_size=2, micro_batch_size=2, **layout)
    assert {tuple(shape) for shape in seen if shape[1] != 63} == {(2 // layout.get("dp_size", 1), 1)}
    assert any(part is not None for parts in results for part in parts)


def test_no_key_or_value_of_the_last_layer_is_sent():
    ids = tokens(1, 64)
    model = build(gpt_neox(heads=4, layers=1))

    def work(engine: Engine) -> tuple[int, int]:
        batch, _ = engine.prepare(ids, None, None)
        sent = []
        for run in (lambda: engine.prefill(batch, "last"), lambda: engine.prefill_only(batch)):
            engine.mesh.traffic.bytes_by_op.clear()
            run()
            sent.append(engine.mesh.traffic.bytes_sent)
        return sent[0], sent[1]

    width, head_dim, others = 32, 8, 3
    # Of one token: its hidden state, cosine, sine and position id (8 bytes); its output and lse.
    small = others * (4 * width + 2 * 4 * head_dim + 8 + 4 * width + 4 * 4)
    for full, last in serve(model, work, ring_degree=4):
        assert last == small
        assert full > last


def test_keys_and_values_of_all_tokens_reach_the_cache():
    """The cache is written once, by the call on all tokens."""
    model, ids = build(llama_gqa()), tokens(2, 17)
    want, got = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.inference_mode():
        expected = model(ids, past_key_values=want).logits[:, -1]

    def work(engine: Engine) -> Tensor:
        tokens_ = LastTokens((17, 17), [list(range(17))], SoloTransport())
        context = engine.runner._context
        with (
            torch.inference_mode(),
            last_tokens_only(engine.runner.decoder, context, tokens_),
            context.forward(SequenceLayout(17), 3, "model"),
        ):
            return engine.model(ids, past_key_values=got, logits_to_keep=1).logits[:, -1]

    assert relative_error(serve(model, work)[0], expected) < TOLERANCE
    for ours, theirs in zip(got.layers, want.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=1e-5)


def test_a_layer_without_attention_is_named():
    class Plain(nn.Module):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            return hidden_states

    def work(engine: Engine) -> Exception | None:
        engine.runner.decoder.layers[-1] = Plain()
        return outcome(lambda: engine.next_token_logits(tokens(1, 9)))

    (error,) = serve(build(llama_gqa()), work)
    assert isinstance(error, UnsupportedModelError)
    assert "Plain ran without attention: prefill_only cannot shorten it" in str(error)


def test_infinity_is_traced_to_its_layer():
    model = build(llama_gqa())
    Decoder.of(model).layers[1].mlp.down_proj.weight.data.fill_(torch.inf)
    errors = serve(model, lambda engine: outcome(lambda: engine.next_token_logits(tokens(1, 9))), ring_degree=2)
    assert {type(error) for error in errors} == {NumericsError}
    assert "layer 1 of 3" in str(errors[0])
