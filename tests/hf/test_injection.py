"""``attn_implementation="ds_ring"``: what it takes, what it refuses, and that the oracle would see it go wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.models.tiny_models import tiny_config, tiny_model
from ds_ring.api import build_engine
from ds_ring.attention import sinks
from ds_ring.attention.spec import AttentionSpec
from ds_ring.config import ParallelConfig, RunConfig
from ds_ring.engine.engine import Engine
from ds_ring.engine.sequence_parallel import SequenceParallelRunner
from ds_ring.errors import DsRingError, UnsupportedModelError
from ds_ring.hf.attention import NAME, register
from ds_ring.hf.attention_context import AttentionContext
from ds_ring.hf.dims import model_dims
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.parallel.topology import Topology
from ds_ring.testing.threaded import ThreadedWorld
from ds_ring.transport.mesh import Mesh
from tests.helpers.architectures import bert
from tests.helpers.mocked_world import one_process, relative_error, serve
from tests.helpers.tiny_models import ARCHITECTURES, build, gemma2, gpt2, gpt_neox, llama_gqa, logits, opt, tokens
from tests.helpers.worlds import mesh_of

LENGTH = 101
TOLERANCE = 1e-5


def count_own_tokens(engine: Engine) -> None:
    """What a model does when it is given no position_ids: every rank starts from 0."""

    def local(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        own = torch.arange(kwargs["input_ids"].shape[1])[None].expand_as(kwargs["input_ids"])
        return args, kwargs | {"position_ids": own}

    engine.model.register_forward_pre_hook(local, with_kwargs=True)


def leave_order_as_it_is(engine: Engine) -> None:
    """Zigzag chunks come back as if they had been contiguous."""
    assert isinstance(engine.runner, SequenceParallelRunner)
    engine.runner.held_positions = lambda length, rank: torch.arange(engine.runner.layout(length).padded_length).chunk(
        3
    )[rank]


@pytest.mark.parametrize("mutate", [count_own_tokens, leave_order_as_it_is], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["gpt_neox", "llama_gqa", "gemma", "gpt2", "opt"])
def test_wrong_positions_or_order_are_far_above_tolerance(name, mutate):
    model, ids = build(ARCHITECTURES[name]()), tokens(1, LENGTH)

    def work(engine: Engine) -> Tensor:
        mutate(engine)
        return engine(ids).logits

    errors = [relative_error(got, logits(model, ids)) for got in serve(model, work, ring_degree=3)]
    assert min(errors) > 1000 * TOLERANCE


@pytest.mark.parametrize(("name", "field"), [("mistral", "window"), ("gemma2", "window"), ("gemma2", "softcap")])
def test_a_forgotten_window_or_softcap_is_far_above_tolerance(name, field, monkeypatch):
    def forgetful(*args: Any) -> AttentionSpec:
        return dataclasses.replace(AttentionSpec(*args), **{field: None})

    monkeypatch.setattr("ds_ring.hf.attention.AttentionSpec", forgetful)
    model, ids = build(ARCHITECTURES[name]()), tokens(1, LENGTH)
    results = serve(model, lambda engine: engine(ids).logits, ring_degree=3)
    assert min(relative_error(got, logits(model, ids)) for got in results) > 1000 * TOLERANCE


def test_a_layer_that_skips_the_attention_is_named():
    model = build(llama_gqa())
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM ran the injected attention 2 times for 3 layers"):
        serve(model, lambda engine: engine(tokens(1, LENGTH)), ring_degree=2)


class _AttendsTwice(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(super().forward(hidden_states, **kwargs), **kwargs)


def test_a_layer_that_attends_twice_is_named():
    model = build(llama_gqa())
    model.model.layers[1].__class__ = _AttendsTwice
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM ran the injected attention 4 times for 3 layers"):
        serve(model, lambda engine: engine(tokens(1, LENGTH)), ring_degree=2)


def test_the_name_without_an_engine_says_what_to_do():
    register()
    model = AutoModelForCausalLM.from_config(llama_gqa(), attn_implementation=NAME)
    with pytest.raises(DsRingError, match=r"LlamaAttention: .*works inside an engine.*ds_ring\.from_pretrained"):
        model(tokens(1, 9))


def test_the_model_inside_an_engine_is_not_to_be_called():
    def work(engine: Engine) -> None:
        with pytest.raises(DsRingError, match="call the engine, not the model inside it"):
            engine.model(tokens(1, 9), use_cache=False)
        engine.model.train()
        with pytest.raises(UnsupportedModelError, match="dropout"):
            engine(tokens(1, 9))
        engine.model.eval()
        # A forward that failed does not leave the model open.
        with pytest.raises(DsRingError, match="call the engine, not the model inside it"):
            engine.model(tokens(1, 9), use_cache=False)

    serve(build(gpt2()), work, ring_degree=2)


def test_a_model_that_asks_for_bidirectional_attention_is_refused():
    words = "BertSelfAttention asks for bidirectional attention, which cannot be sharded yet"
    with pytest.raises(UnsupportedModelError, match=words):
        serve(bert(), lambda engine: engine(tokens(1, 9)), ring_degree=2)


@pytest.mark.parametrize("layout", [{"ring_degree": 3}, {"ulysses_degree": 2}, {"tp_size": 2}], ids=str)
def test_forgotten_sinks_are_far_above_tolerance(layout, monkeypatch):
    monkeypatch.setattr("ds_ring.attention.sinks.apply_", lambda out, lse, sinks: out)
    model, ids = build(ARCHITECTURES["gpt_oss"]()), tokens(1, LENGTH)
    results = serve(model, lambda engine: engine(ids).logits, **layout)
    assert min(relative_error(got, logits(model, ids)) for got in results) > 1000 * TOLERANCE


@pytest.mark.parametrize(
    "layout", [{"ulysses_degree": 2}, {"ulysses_degree": 3, "ring_degree": 2}, {"tp_size": 2}], ids=str
)
def test_sinks_of_other_heads_are_far_above_tolerance(layout, monkeypatch):
    apply_ = sinks.apply_
    monkeypatch.setattr("ds_ring.attention.sinks.apply_", lambda out, lse, sinks: apply_(out, lse, sinks.flip(0)))
    model, ids = build(ARCHITECTURES["gpt_oss"]()), tokens(1, LENGTH)
    results = serve(model, lambda engine: engine(ids).logits, **layout)
    assert min(relative_error(got, logits(model, ids)) for got in results) > 1000 * TOLERANCE


@pytest.mark.parametrize("shape", [(3,), (8,), (1, 4)])
def test_sinks_that_are_not_one_a_head_are_refused(shape):
    with (
        attention_alone() as attention,
        pytest.raises(UnsupportedModelError, match="Linear has attention sinks of shape"),
    ):
        attention(s_aux=torch.zeros(shape))


def test_heads_that_the_config_does_not_have_are_refused_where_ranks_would_share_them():
    """JetMoe makes as many as it has key/value heads and experts a token."""
    model, ids = tiny_model(tiny_config("jetmoe")), tokens(1, 40)
    options = {"max_length": 64}
    with pytest.raises(UnsupportedModelError, match=r"JetMoeAttention attends with 4 heads, .*ulysses_degree=3"):
        serve(model, lambda engine: engine(ids), ulysses_degree=3, **options)
    for got in serve(model, lambda engine: engine(ids).logits, ring_degree=3, **options):
        assert relative_error(got, logits(model, ids)) < TOLERANCE


def test_dropout_is_refused():
    def work(engine: Engine) -> None:
        engine.model.train()
        engine(tokens(1, 9))

    with pytest.raises(UnsupportedModelError, match=r"GPT2Attention asks for dropout=0\.1"):
        serve(build(gpt2(attn_pdrop=0.1)), work, ring_degree=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, "a mask of its own"),
        ({"position_bias": torch.zeros(1, 4, 5, 5)}, "position_bias"),
        ({"alibi": torch.zeros(4, 1, 5)}, "alibi"),
        ({"is_causal": False}, "bidirectional attention"),
    ],
    ids=["mask", "position_bias", "alibi", "is_causal"],
)
def test_arguments_that_would_be_dropped_are_refused(options, words):
    with attention_alone() as attention, pytest.raises(UnsupportedModelError, match=f"Linear asks for {words}"):
        attention(**options)


@contextmanager
def attention_alone() -> Iterator[Callable[..., Tensor]]:
    """The registered function on one rank with four heads, called as transformers calls it."""
    module, q = nn.Linear(1, 1), torch.zeros(1, 4, 5, 8)
    mesh = Mesh.build(Topology(), 0, lambda axis, ranks: None)
    context = AttentionContext(mesh, ParallelConfig(), num_heads=4, tile_tokens=0)
    module._ds_ring_context = context
    register()
    with context.forward(SequenceLayout(5), 0, "Model"):
        yield lambda **options: ALL_ATTENTION_FUNCTIONS[NAME](
            module, q, q, q, **{"attention_mask": None, "scaling": 1.0} | options
        )


def test_a_model_left_in_training_mode_is_served_without_dropout():
    model, ids = build(opt(dropout=0.5)), tokens(1, LENGTH)
    want = logits(model, ids)
    for got in serve(model.train(), lambda engine: engine(ids).logits, ring_degree=2):
        assert relative_error(got, want) < TOLERANCE


def wide_heads() -> PreTrainedModel:
    """Heads wide enough to hold rotary frequencies that fp16 would change by much at a thousand tokens."""
    return build(gpt_neox(heads=4, layers=2, hidden_size=128))


def half(model: PreTrainedModel) -> PreTrainedModel:
    """The model as transformers loads it in fp16: parameters halved, rotary frequencies in fp32."""
    halved = AutoModelForCausalLM.from_config(model.config, dtype=torch.float16).eval()
    halved.load_state_dict(model.state_dict())
    return halved


FP16_LAYOUTS = [{"ulysses_degree": 2, "ring_degree": 2}, {"tp_size": 2, "pp_size": 2}]


@pytest.mark.parametrize("layout", FP16_LAYOUTS, ids=str)
@pytest.mark.parametrize("given", ["fp32", "fp16"])
def test_buffers_stay_in_fp32_while_deepspeed_halves_the_model(layout, given):
    model = wide_heads()
    want = {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}

    def dtypes(engine: Engine) -> tuple[dict[str, Tensor], set[torch.dtype]]:
        return dict(engine.model.named_buffers()), {p.dtype for p in engine.model.parameters()}

    for buffers, parameters in serve(half(model) if given == "fp16" else model, dtypes, dtype="fp16", **layout):
        assert parameters == {torch.float16}
        assert want
        assert all(torch.equal(buffers[name], buffer) for name, buffer in want.items())


@pytest.mark.parametrize("layout", FP16_LAYOUTS, ids=str)
def test_fp16_equals_fp16_transformers_at_a_thousand_tokens(layout):
    model, ids = half(wide_heads()), tokens(1, 1000)
    want = logits(model, ids).float()
    for got in serve(model, lambda engine: engine(ids).logits, dtype="fp16", **layout):
        assert got.dtype == torch.float16
        assert frobenius(got, want) < 5e-3


@pytest.mark.parametrize("layout", FP16_LAYOUTS, ids=str)
def test_halved_rotary_frequencies_would_show_at_a_thousand_tokens(layout):
    model, ids = half(wide_heads()), tokens(1, 1000)

    def work(engine: Engine) -> Tensor:
        for module in engine.model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = module.inv_freq.half().float()
        return engine(ids).logits

    want = logits(model, ids).float()
    assert min(frobenius(got, want) for got in serve(model, work, dtype="fp16", **layout)) > 2e-2


@pytest.mark.parametrize("layout", [{}, {"pp_size": 2}], ids=["whole", "stage"])
def test_an_untouched_model_of_the_same_config_keeps_its_own_attention(layout):
    config, ids = gemma2(), tokens(1, LENGTH)
    original = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ("sdpa", "flex_attention")}
    untouched, injected = build(config), build(config)
    before, layers = logits(untouched, ids), config.num_hidden_layers
    run = RunConfig.load({"dtype": "fp32"}, **layout)
    mesh = mesh_of(ThreadedWorld(run.topology.world_size), run.topology, 0)
    with one_process():
        engine = build_engine(injected, run, mesh, model_dims(config), torch.device("cpu"))
    assert engine.model.config._attn_implementation == NAME
    assert untouched.config._attn_implementation == config._attn_implementation != NAME
    assert untouched.config.num_hidden_layers == config.num_hidden_layers == layers
    assert {name: ALL_ATTENTION_FUNCTIONS[name] for name in original} == original
    assert torch.equal(logits(untouched, ids), before)


def frobenius(got: Tensor, want: Tensor) -> float:
    """Over all tokens at once: the worst single token of an fp16 model is 1 % away from fp32 all by itself."""
    return ((got.float() - want).norm() / want.norm()).item()
