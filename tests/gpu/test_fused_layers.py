"""On a GPU: the compiled element-wise kernels and the GELU inside products, against fp64; whole fused models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from ds_ring.attention.last_token import last_token_attention
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.fusion.fuse import Fusion
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.linear import Linear, gelu_inside_agrees
from ds_ring.kernels import elementwise
from ds_ring.kernels.elementwise import NormSpec
from ds_ring.transport.solo import SoloTransport
from tests.helpers.marks import ON_A_GPU
from tests.helpers.tiny_models import ARCHITECTURES, build, gpt_neox, llama_gqa, tokens

pytestmark = ON_A_GPU

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32]
EXPERTS = ("mixtral", "gpt_oss")
"""A rounding may send a token to another expert, in stock models too."""


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def error(got: Tensor | None, want: Tensor) -> float:
    assert got is not None
    assert got.shape == want.shape
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [77, 1000, 8192, 16384])
@pytest.mark.parametrize("spec", [NormSpec(True, 0.0, 1e-5), NormSpec(False, 0.0, 1e-6), NormSpec(False, 1.0, 1e-6)])
def test_sum_and_norm(dtype, width, spec):
    a, b = (random(2, 333, width, dtype=dtype, seed=i) for i in range(2))
    weight, bias, fold = (random(width, dtype=dtype, seed=2 + i) for i in range(3))
    total, normed = elementwise.add_norm((a, b), spec, weight, bias, fold)
    both = a.double() + b.double()
    centred = both - both.mean(-1, keepdim=True) if spec.centred else both
    normal = centred / (centred.square().mean(-1, keepdim=True) + spec.eps).sqrt()
    assert error(normed, normal * (spec.offset + weight.double()) + bias.double()) < TOLERANCE[dtype]
    assert error(total, both + fold.double()) < TOLERANCE[dtype]
    _, alone = elementwise.add_norm((a,), spec, weight, want_total=False)
    _, again = elementwise.add_norm((a,), spec, weight, want_total=False)
    assert alone is not None
    assert again is not None
    assert torch.equal(alone, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_are_in_use(dtype):
    assert elementwise.self_test(torch.device("cuda"), dtype) is None
    assert elementwise.kernels_run_on(torch.empty(1, device="cuda", dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu", "relu"])
def test_gates(dtype, kind):
    gate, up = random(3, 111, 2 * 2500, dtype=dtype).chunk(2, dim=-1)
    want = elementwise.activate(kind, gate.double()) * up.double()
    assert error(elementwise.gated(kind, gate, up), want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "width", "rotary"), [(16, 512, 128), (3, 128, 128), (5, 96, 96), (6, 80, 20)])
def test_rotary(dtype, heads, width, rotary):
    qkv = random(2, 333, heads, 3 * width, dtype=dtype).transpose(1, 2)
    q, k, _ = qkv.chunk(3, dim=-1)
    angle = torch.outer(torch.arange(333, device="cuda"), torch.rand(rotary // 2, device="cuda"))[None]
    cos, sin = (torch.cat((f(angle), f(angle)), -1).to(dtype) for f in (torch.cos, torch.sin))
    for got, x in zip(elementwise.rotate(q, k, cos, sin), (q, k), strict=True):
        low, high = x[..., : rotary // 2].double(), x[..., rotary // 2 : rotary].double()
        c, s = cos[:, None, :, : rotary // 2].double(), sin[:, None, :, : rotary // 2].double()
        want = torch.cat((low * c - high * s, high * c + low * s, x[..., rotary:].double()), -1)
        assert error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary", [512, 128, 6])
def test_rotary_in_place_is_rotary_and_touches_nothing_else(dtype, rotary):
    fused = random(2, 301, 5, 3 * 512, dtype=dtype).transpose(1, 2)
    angle = random(1, 301, rotary // 2, dtype=torch.float32, seed=1)
    cos, sin = (torch.cat((f(angle), f(angle)), -1).to(dtype) for f in (torch.cos, torch.sin))
    before = fused.clone()
    want = elementwise.rotated(fused[..., 512:1024], cos, sin)
    elementwise.rotate_(fused[..., 512:1024], (cos, sin))
    torch.testing.assert_close(fused[..., 512 : 512 + rotary], want[..., :rotary])
    rotated = slice(512, 512 + rotary)
    before[..., rotated] = fused[..., rotated]
    assert torch.equal(fused, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 777])
def test_gelu_inside_a_product(dtype, bias, rows):
    up = nn.Linear(512, 1024, bias=bias, device="cuda", dtype=dtype)
    x = random(1, rows, 512, dtype=dtype)
    fused = Linear.of(up)
    assert fused is not None
    with torch.inference_mode():
        linear = x.double() @ up.weight.double().t() + (up.bias.double() if bias else 0)
        assert error(fused.with_gelu(x), gelu(linear, approximate="tanh")) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_this_gpus_products_compute_the_tanh_gelu(dtype):
    assert gelu_inside_agrees(torch.device("cuda"), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in EXPERTS])
def test_fused_models_are_as_near_to_fp32_as_stock_ones(name, dtype):
    ids = tokens(2, 301).cuda()
    model = build(ARCHITECTURES[name]()).cuda()
    stock = copy.deepcopy(model).to(dtype)
    for (_, half), (_, full) in zip(stock.named_buffers(), model.named_buffers(), strict=True):
        if half.is_floating_point():
            half.data = full.data  # rotary frequencies stay fp32
    fused = copy.deepcopy(stock)
    fusion = Fusion(Decoder.of(fused))
    with torch.inference_mode():
        want, near, got = (m(ids, use_cache=False).logits.double() for m in (model, stock, fused))
    assert "Triton kernels" in str(fusion)
    assert fusion.done["AddNorm"] + fusion.done["Sum"] >= len(Decoder.of(fused).layers)
    floor = 1e-5 if dtype == torch.float32 else 0.0
    assert error(got, want) < 1.5 * error(near, want) + floor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 512])
def test_attention_of_the_last_tokens(dtype, head_dim):
    q = random(3, 1, 8, head_dim, dtype=dtype)
    k, v = (random(3, 1001, 4, head_dim, dtype=dtype, seed=i) for i in (1, 2))
    seen, spec = [range(1001), range(1001), range(100, 351)], AttentionSpec(head_dim**-0.5, window=1001)
    got = last_token_attention(q, k, v, seen=seen, spec=spec, transport=SoloTransport())
    for row, keys in enumerate(seen):
        at = slice(row, row + 1), slice(keys.start, keys.stop)
        want, _ = reference_attention(q[at[0]], k[at], v[at], spec=AttentionSpec(head_dim**-0.5), causal=False)
        assert error(got[at[0]], want.to(got.device)) < TOLERANCE[dtype]


@pytest.mark.parametrize("config", [gpt_neox, llama_gqa], ids=["gpt_neox", "llama"])
def test_a_fused_forward_waits_for_nothing(config):
    """PyTorch raises where the host would wait for the device."""
    model = build(config()).half().cuda()
    Fusion(Decoder.of(model))
    layer = Decoder.of(model).layers[0]
    x = random(2, 33, model.config.hidden_size, dtype=torch.float16)
    cos = random(1, 33, model.config.hidden_size // model.config.num_attention_heads, dtype=torch.float16)
    with torch.inference_mode():
        layer(x, position_embeddings=(cos, cos), attention_mask=None)  # compiles, and traces the layer
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x, position_embeddings=(cos, cos), attention_mask=None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
