"""Fused layers: the model's own results, what was recognised, and what was left as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.models.gpt_neox import modeling_gpt_neox

from ds_ring.engine.engine import Engine
from ds_ring.fusion.fuse import Fusion
from ds_ring.hf import linear
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.linear import Linear
from ds_ring.kernels import elementwise
from tests.helpers.mocked_world import relative_error, serve
from tests.helpers.tiny_models import (
    ARCHITECTURES,
    build,
    gemma2,
    gpt2,
    gpt_neox,
    llama_gqa,
    logits,
    opt,
    pythia,
    qwen3,
    tokens,
)

TOLERANCE = 1e-5
LENGTH = 63

PRE_NORM = {"norm": 7, "LinearGelu": 3, "AddNorm": 3, "AddLinear": 3}
GATED = {"rotary": 3, "norm": 7, "Gated": 3, "AddNorm": 3, "AddLinear": 3}
EXPECTED: dict[str, dict[str, int]] = {
    "gpt_neox": {"rotary": 3} | PRE_NORM,
    "pythia": {"rotary": 3, "norm": 7, "LinearGelu": 3, "Sum": 3, "AddLinear": 3},
    "llama_gqa": GATED,
    "llama_mqa": GATED,
    "qwen2": GATED,
    "qwen3": GATED | {"norm": 13},
    "gemma": GATED,
    "gemma2": {"rotary": 3, "norm": 13, "Gated": 3, "AddNorm": 3},
    "gemma3": {"rotary": 4, "norm": 25, "Gated": 4, "AddNorm": 4},
    "mistral": GATED,
    "mixtral": {"rotary": 3, "norm": 7, "AddNorm": 3},
    "gpt_oss": {"norm": 7, "AddNorm": 3},
    "phi3": GATED,
    "gpt2": PRE_NORM,
    "opt": {"norm": 7, "Sum": 3, "AddLinear": 3},
}


def fuse(model: PreTrainedModel) -> Fusion:
    return Fusion(Decoder.of(model))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_models_equal_themselves(name):
    model, ids = build(ARCHITECTURES[name]()), tokens(2, LENGTH)
    stock, want = copy.deepcopy(model), logits(model, ids)
    fusion = fuse(model)
    assert relative_error(logits(model, ids), want) < TOLERANCE
    assert {name: count for name, count in fusion.done.items() if count} == EXPECTED[name]
    assert not fusion.left
    # Other lengths and batches take the same graphs.
    for batch, length in ((1, 1), (3, 17), (1, 40)):
        other = tokens(batch, length, seed=length)
        assert relative_error(logits(model, other), logits(stock, other)) < TOLERANCE
    # With stock attention there is a mask or none, where a window slides.
    assert max(len(layer.forward.__func__._graphs) for layer in Decoder.of(model).layers) <= 2


LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "dp2": {"dp_size": 2},
    "ring2": {"ring_degree": 2},
    "tp2": {"tp_size": 2},
    "pp2": {"pp_size": 2},
}


def fused(engine: Engine) -> tuple[Tensor, dict[str, int], int]:
    got = engine(tokens(2, LENGTH)).logits
    assert engine.runner.fusion is not None
    return got, {k: n for k, n in engine.runner.fusion.done.items() if n}, len(engine.runner.decoder.layers)


@cache
def fused_alone(config: Callable[[], PretrainedConfig]) -> dict[str, int]:
    return serve(build(config()), fused)[0][1]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("config", [gpt_neox, lambda: pythia(), llama_gqa, qwen3, gemma2, gpt2, opt])
def test_every_layout_fuses_alike(config, layout):
    if layout == {"tp_size": 2} and config in (gpt2, llama_gqa):
        pytest.skip("AutoTP cannot shard it over two ranks")
    model, ids = build(config()), tokens(2, LENGTH)
    want = logits(model, ids)

    alone = fused_alone(config)
    for got, done, layers in serve(model, fused, batch_size=2, **layout):
        assert relative_error(got, want) < TOLERANCE
        for name in ("LinearGelu", "Gated", "AddNorm", "Sum", "AddLinear", "rotary"):
            assert done.get(name, 0) * model.config.num_hidden_layers == alone.get(name, 0) * layers
        assert bool(done.get("bias in linear")) == (
            "tp_size" in layout and config is not qwen3 and config is not gemma2
        )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_without_fusion_the_model_is_untouched(layout):
    model, ids = build(gpt_neox(heads=4, layers=2)), tokens(2, LENGTH)

    def work(engine: Engine) -> Tensor:
        assert engine.runner.fusion is None
        assert not [name for name, module in engine.model.named_modules() if "forward" in vars(module)]
        return engine(ids).logits

    for got in serve(model, work, batch_size=2, fusion="none", **layout):
        assert relative_error(got, logits(model, ids)) < TOLERANCE


def test_other_models_of_the_class_stay_as_they_are():
    first, second, ids = build(gpt_neox(heads=4, layers=2)), build(gpt_neox(heads=4, layers=2)), tokens(1, LENGTH)
    before, original = logits(second, ids), modeling_gpt_neox.apply_rotary_pos_emb
    fuse(first)
    logits(first, ids)
    assert not [name for name, module in second.named_modules() if "forward" in vars(module)]
    assert modeling_gpt_neox.apply_rotary_pos_emb is original
    assert torch.equal(logits(second, ids), before)


def test_two_fused_models_do_not_share_anything():
    models = [build(config()) for config in (gpt_neox, llama_gqa)]
    ids = tokens(1, LENGTH)
    want = [logits(model, ids) for model in models]
    fusions = [fuse(model) for model in models]
    for model, expected in [*zip(models, want, strict=True), *zip(models, want, strict=True)]:
        assert relative_error(logits(model, ids), expected) < TOLERANCE
    assert fusions[0].done["norm"] == 9
    assert fusions[1].done["norm"] == 7


def test_the_fused_operations_run(monkeypatch):
    calls: dict[str, int] = {}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return wrapper

    for name in ("add_norm", "rotate"):
        monkeypatch.setattr(elementwise, name, counted(name, getattr(elementwise, name)))
    for name in ("with_gelu", "add_to_"):
        monkeypatch.setattr(Linear, name, counted(name, getattr(Linear, name)))
    model = build(gpt_neox())
    fuse(model)
    logits(model, tokens(1, LENGTH))
    calls.clear()  # recognising norms and the rotary function called them
    logits(model, tokens(1, LENGTH))
    assert calls == {"add_norm": 9, "rotate": 4, "with_gelu": 4, "add_to_": 4}


@pytest.mark.parametrize("config", [gpt_neox, qwen3, gpt2])
def test_steps_of_one_token_with_a_cache(config):
    model, ids = build(config()), tokens(2, 21)
    want = logits(model, ids)
    fuse(model)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :18], past_key_values=cache)
        for at in (18, 19, 20):
            got = model(ids[:, at : at + 1], past_key_values=cache).logits
            assert relative_error(got[:, 0], want[:, at]) < TOLERANCE
    # One graph a way of calling: with a mask over several tokens, and without one.
    assert max(len(layer.forward.__func__._graphs) for layer in Decoder.of(model).layers) <= 2


def test_hooks_of_layers_and_modules_still_run():
    model, seen = build(gpt_neox(heads=4, layers=2)), []
    fuse(model)
    for layer in Decoder.of(model).layers:
        layer.register_forward_hook(lambda *_: seen.append("layer"))
        layer.attention.register_forward_hook(lambda *_: seen.append("attention"))
    logits(model, tokens(1, 5))
    assert seen == ["attention", "layer"] * 2


def test_a_linear_layer_with_a_hook_is_not_fused():
    model, seen = build(gpt_neox(heads=4, layers=2)), []
    for layer in Decoder.of(model).layers:
        layer.mlp.dense_h_to_4h.register_forward_hook(lambda *_: seen.append("up"))
    fusion = fuse(model)
    logits(model, tokens(1, 5))
    assert seen == ["up"] * 2
    assert fusion.done["LinearGelu"] == 0


def test_training_runs_the_model_itself():
    model, ids = build(gpt2()), tokens(1, LENGTH)
    want = logits(model, ids)
    fusion = fuse(model)
    with torch.enable_grad():
        assert torch.equal(model(ids, use_cache=False).logits, want)
    assert fusion.done["AddNorm"] == 0


class _DependsOnValues(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.layer(hidden_states, **kwargs) if hidden_states.sum() > -1e9 else hidden_states


def test_what_cannot_be_traced_is_left_and_named(caplog):
    model, ids = build(llama_gqa()), tokens(1, LENGTH)
    want, layers = logits(model, ids), Decoder.of(model).layers
    layers[1] = _DependsOnValues(layers[1]).eval()
    fusion = fuse(model)
    with caplog.at_level("INFO", "ds_ring"):
        assert relative_error(logits(model, ids), want) < TOLERANCE
    assert fusion.done["AddNorm"] == 2
    assert len(caplog.records) == 1
    assert "2 x AddNorm" in caplog.text
    assert "plain PyTorch on cpu" in caplog.text
    assert "as it is: _DependsOnValues: TraceError" in caplog.text


class _Shifted(nn.Module):
    """An MLP, or a layer, with a parameter that is no submodule's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.shift = inner, nn.Parameter(torch.ones(()))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.inner(hidden_states, **kwargs) + self.shift


def test_parameters_outside_submodules_are_kept_out_of_the_graph(caplog):
    model, ids = build(llama_gqa()), tokens(1, LENGTH)
    layers = Decoder.of(model).layers
    layers[0].mlp = _Shifted(layers[0].mlp).eval()
    layers[1] = _Shifted(layers[1]).eval()
    want = logits(model, ids)
    fusion = fuse(model)
    with caplog.at_level("INFO", "ds_ring"):
        assert relative_error(logits(model, ids), want) < TOLERANCE
    assert (fusion.done["AddNorm"], fusion.done["AddLinear"]) == (2, 1)
    assert "as it is: _Shifted: its forward uses a parameter of its own" in caplog.text


def test_a_sum_is_not_written_over_while_others_need_it():
    """OPT's residual, GPT-NeoX's input: the layer's input is what a hook of the layer before has seen."""
    for config in (opt(), gpt_neox(heads=4, layers=2), pythia()):
        model, ids = build(config), tokens(1, LENGTH)
        fuse(model)
        outputs: list[Tensor] = []
        copies: list[Tensor] = []

        def keep(module: nn.Module, args: Any, out: Any, outputs: list[Tensor] = outputs) -> None:
            outputs.append(out if isinstance(out, Tensor) else out[0])

        def clone(module: nn.Module, args: Any, out: Any, copies: list[Tensor] = copies) -> None:
            copies.append((out if isinstance(out, Tensor) else out[0]).clone())

        for layer in Decoder.of(model).layers:
            layer.register_forward_hook(keep)
            layer.register_forward_hook(clone)
        logits(model, ids)
        assert all(torch.equal(a, b) for a, b in zip(outputs, copies, strict=True))


def test_autotp_biases_are_added_once():
    model, ids = build(gpt_neox(heads=4, layers=2)), tokens(1, LENGTH)
    twice = copy.deepcopy(model)
    for layer in Decoder.of(twice).layers:
        layer.mlp.dense_4h_to_h.bias.data *= 2
    assert relative_error(logits(twice, ids), logits(model, ids)) > 1000 * TOLERANCE
    for got in serve(model, lambda engine: engine(ids).logits, tp_size=2):
        assert relative_error(got, logits(model, ids)) < TOLERANCE


def test_a_linear_layer_without_bias_has_a_gelu():
    up = nn.Linear(8, 16, bias=False)
    fused = Linear.of(up)
    assert fused is not None
    x = torch.randn(2, 3, 8)
    with torch.inference_mode():
        torch.testing.assert_close(fused.with_gelu(x), nn.functional.gelu(up(x), approximate="tanh"))
    assert linear.Linear.of(nn.Bilinear(2, 2, 2)) is None
