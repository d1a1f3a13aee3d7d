"""Whole weights read in slices, as tensor parallelism cuts them: threads as ranks, against the unsliced model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PhiConfig, PreTrainedModel

from ds_ring.errors import ConfigError, UnsupportedModelError
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.tensor_slices import Slice, sliced, slices_of
from ds_ring.parallel.topology import Topology
from ds_ring.transport.base import Transport
from ds_ring.transport.mesh import Mesh
from ds_ring.transport.solo import SoloTransport
from tests.helpers import tiny_models
from tests.helpers.marks import NEEDS_A_GPU
from tests.helpers.mocked_world import one_process
from tests.helpers.process_group_world import ProcessGroupWorld
from tests.helpers.tiny_models import build, logits, tokens
from tests.helpers.worlds import in_group

T = TypeVar("T")


def phi(**overrides):
    """Biases everywhere; attention and MLP side by side; part of each head rotates."""
    return PhiConfig(**tiny_models._decoder(num_key_value_heads=2) | overrides)


CASES = {
    "llama_gqa": (tiny_models.llama_gqa, 3),
    "qwen2": (tiny_models.qwen2, 2),
    "qwen3": (tiny_models.qwen3, 2),
    "mistral": (tiny_models.mistral, 2),
    "gemma2": (tiny_models.gemma2, 2),
    "gemma3": (tiny_models.gemma3, 2),
    "phi": (phi, 2),
    "gpt_neox": (lambda **o: tiny_models.gpt_neox(**{"heads": 6, "layers": 2} | o), 3),
    "pythia": (tiny_models.pythia, 2),
}
each_case = pytest.mark.parametrize("case", CASES)
_building = threading.Lock()


def sliced_on_ranks(case: str, work: Callable[[PreTrainedModel, dict[str, Slice], Transport], T]) -> list[T]:
    """``work`` inside the block on every rank, each with the same model of its own."""
    config, size = CASES[case]

    def on_rank(transport: Transport) -> T:
        with _building:
            model = build(config())
        with sliced(model, transport.rank, size, transport) as slices:
            return work(model, slices, transport)

    return in_group(size, on_rank)


def layer_weights(model: PreTrainedModel) -> list[Tensor]:
    return [m.weight for m in Decoder.of(model).layers.modules() if isinstance(m, nn.Linear)]


def assert_same(got: Tensor, want: Tensor) -> None:
    """To 1e-5 of the largest logit."""
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@each_case
def test_logits_of_a_sequence(case):
    ids = tokens(2, 37)
    want = logits(build(CASES[case][0]()), ids)
    for got in sliced_on_ranks(case, lambda model, *_: logits(model, ids)):
        assert_same(got, want)


@each_case
def test_steps_of_decoding_with_a_cache_of_the_ranks_heads(case):
    config, size = CASES[case]
    ids = tokens(2, 33)
    model = build(config())
    want = logits(model, ids)
    heads = model.config.get_text_config()
    kv_heads = getattr(heads, "num_key_value_heads", None) or heads.num_attention_heads

    def work(model, *_):
        cache = DynamicCache(config=model.config)
        parts = [model(ids[:, :30], past_key_values=cache, use_cache=True).logits]
        parts += [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(30, 33)]
        assert {layer.keys.shape[1] for layer in cache.layers} == {kv_heads // size}
        return torch.cat(parts, dim=1)

    for got in sliced_on_ranks(case, work):
        assert_same(got, want)


@pytest.mark.parametrize("case", ["llama_gqa", "pythia"])
def test_a_step_after_a_prefill_by_the_whole_model(case):
    """The cache's heads are cut as the projections are."""
    config, size = CASES[case]
    ids = tokens(1, 20)
    want = logits(build(config()), ids)

    def on_rank(transport: Transport) -> Tensor:
        with _building:
            model = build(config())
        cache = DynamicCache()
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        own = DynamicCache()
        for i, layer in enumerate(cache.layers):
            own.update(*(t.chunk(size, dim=1)[transport.rank] for t in (layer.keys, layer.values)), i)
        with sliced(model, transport.rank, size, transport):
            return model(ids[:, -1:], past_key_values=own, use_cache=True).logits

    for got in in_group(size, on_rank):
        assert_same(got, want[:, -1:])


@pytest.mark.parametrize("case", ["gpt_neox", "qwen2"])
def test_over_process_groups(case):
    config, size = CASES[case]
    ids = tokens(1, 9)
    want = logits(build(config()), ids)

    def on_rank(rank: int) -> Tensor:
        transport = Mesh.from_process_groups(Topology(tp=size))["tp"]
        with _building:
            model = build(config())
        with sliced(model, transport.rank, size, transport):
            return logits(model, ids)

    with one_process():
        for got in ProcessGroupWorld(size).run(on_rank):
            assert_same(got, want)


@each_case
def test_slices_are_views_and_together_the_weights(case):
    config, size = CASES[case]
    whole = {
        name: m for name, m in Decoder.of(build(config())).module.named_modules()
        if isinstance(m, nn.Linear) and name.startswith("layers.")
    }  # fmt: skip

    def work(model, slices, transport):
        decoder = Decoder.of(model).module
        for name, part in slices.items():
            weight = decoder.get_submodule(name).weight
            assert part.weight.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
            assert part.weight.numel() * size == weight.numel()
        return slices

    ranks = sliced_on_ranks(case, work)
    for name, module in whole.items():
        parts = [slices[name] for slices in ranks]
        assert torch.equal(torch.cat([p.weight for p in parts], dim=1 if parts[0].reduce else 0), module.weight)
        if module.bias is not None and parts[0].reduce is None:
            assert torch.equal(torch.cat([p.bias for p in parts]), module.bias)
    assert all(slices.keys() == whole.keys() for slices in ranks)


class WeightsRead(TorchDispatchMode):
    """Bytes of the layers' weights that operations take, whether to multiply or to copy."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.storages = {w.untyped_storage().data_ptr() for w in layer_weights(model)}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.namespace == "aten" and func is not torch.ops.aten.detach.default:
            for argument in args:
                if isinstance(argument, Tensor) and argument.untyped_storage().data_ptr() in self.storages:
                    self.bytes += argument.nbytes
        return func(*args, **(kwargs or {}))


@each_case
@pytest.mark.parametrize("rows", [1, 3])
def test_each_rank_reads_its_share_of_the_weights_and_sends_two_all_reduces_a_layer(case, rows):
    size = CASES[case][1]
    ids = tokens(rows, 1)
    model = build(CASES[case][0]())
    total = sum(w.nbytes for w in layer_weights(model))
    with torch.inference_mode(), WeightsRead(model) as whole:
        model(ids, use_cache=False)
    assert whole.bytes == total

    def work(model, slices, transport):
        with WeightsRead(model) as read:
            model(ids, use_cache=False)
        return read.bytes, dict(transport.traffic.bytes_by_op)

    config = model.config.get_text_config()
    message = rows * config.hidden_size * 4
    sent = 2 * config.num_hidden_layers * (message * 2 * (size - 1) // size)
    assert sliced_on_ranks(case, work) == [(total // size, {"all_reduce": sent})] * size


@pytest.mark.parametrize("fails", [False, True])
def test_after_the_block_the_model_is_as_it_was(fails):
    model = build(tiny_models.qwen3())
    ids = tokens(1, 5)
    before = logits(model, ids)
    state = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    calls = []
    hook = Decoder.of(model).layers[0].mlp.up_proj.register_forward_hook(lambda *args: calls.append(1))
    try:
        with sliced(model, 0, 1, SoloTransport()):
            assert torch.equal(logits(model, ids), before)
            inside = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in model.state_dict().items()}
            assert inside == state
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert calls == [1]
    hook.remove()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(logits(model, ids), before)


def test_a_model_is_not_sliced_twice():
    model = build(tiny_models.qwen2())
    with (
        sliced(model, 0, 1, SoloTransport()),
        pytest.raises(AssertionError, match="sliced already"),
        sliced(model, 0, 1, SoloTransport()),
    ):
        pass


class Silent(SoloTransport):
    """Of a larger group, for what is refused before anything moves."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


class OwnLinear(nn.Linear):
    """What a quantised layer looks like."""


@pytest.mark.parametrize(
    ("config", "size", "error", "message"),
    [
        (tiny_models.phi3, 2, UnsupportedModelError, r"Phi3ForCausalLM.*self_attn.*of a Linear, as "),
        (tiny_models.mixtral, 2, UnsupportedModelError, r"MixtralForCausalLM.*experts|MixtralForCausalLM.*gate"),
        (tiny_models.gpt2, 2, UnsupportedModelError, "GPT2LMHeadModel.*no tensor-parallel plan"),
        (tiny_models.opt, 2, UnsupportedModelError, "OPTForCausalLM.*no tensor-parallel plan"),
        (tiny_models.llama_mqa, 2, ConfigError, "num_kv_heads=1 is not divisible by tp_size=2; use 1"),
        (tiny_models.llama_gqa, 2, ConfigError, "num_heads=9 is not divisible by tp_size=2; try 3"),
        (
            lambda: tiny_models.qwen2(intermediate_size=97), 2, ConfigError,
            r"Qwen2ForCausalLM: layers\.0\.mlp\.gate_proj has 97 outputs, not divisible by tp_size=2",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_by_name(config, size, error, message):
    model = build(config())
    with pytest.raises(error, match=message), sliced(model, 0, size, Silent(size)):
        pass
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_that_are_not_plain_ones_and_parameters_out_of_plan_are_refused():
    model = build(tiny_models.qwen2())
    layer = Decoder.of(model).layers[1]
    layer.mlp.extra = nn.Parameter(torch.zeros(6))
    with pytest.raises(UnsupportedModelError, match=r"layers\.\*\.mlp\.extra, of a Qwen2MLP, nowhere"):
        slices_of(model, 0, 2, Silent(2))
    del layer.mlp.extra
    layer.mlp.up_proj = OwnLinear(48, 96, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"mlp\.up_proj\.weight, of a OwnLinear, as colwise"):
        slices_of(model, 0, 2, Silent(2))


@pytest.mark.gpu
@NEEDS_A_GPU
@pytest.mark.parametrize("rows", [1, 8, 512])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_gpu_multiplies_with_the_view_and_not_with_a_copy(dim, rows):
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    part = weight.narrow(dim, 1024, 2048)
    share = Slice(part, None, SoloTransport() if dim == 1 else None)
    x = torch.randn(rows, 1, part.shape[1], device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        share(x)  # cuBLAS takes its workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        got = share(x)
        assert torch.cuda.max_memory_allocated() - before < part.nbytes // 2
    want = x.double() @ part.double().t()
    assert (got.double() - want).norm() < 1e-3 * want.norm()
