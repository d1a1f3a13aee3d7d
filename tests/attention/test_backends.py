"""Which back-end serves a block, and the self-test that each must pass first; no GPU needed."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ds_ring.attention.backends import select
from ds_ring.attention.backends.base import (
    ATTENTION512,
    CUDNN,
    EAGER,
    FLASH,
    MEMORY_EFFICIENT,
    TRITON,
    Aligned,
    AlignedToFirst,
    Backend,
)
from ds_ring.attention.backends.select import cudnn_pays, select_backend, usable
from ds_ring.attention.backends.selftest import self_test
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec, BlockSpec
from tests.helpers.random_blocks import bottom_right

CPU = torch.device("cpu")
PLAIN_SPEC, WINDOWED, CAPPED = AttentionSpec(1.0), AttentionSpec(1.0, window=9), AttentionSpec(1.0, softcap=9.0)
SQUARE, FULL = BlockSpec(PLAIN_SPEC, True, 0), BlockSpec(PLAIN_SPEC, False, 0)


def top_left(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = reference_attention(q, k, v, spec=AttentionSpec(scale), causal=causal)
    return out.to(q.dtype), lse.float()


def base_two(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = bottom_right(q, k, v, scale=scale, causal=causal)
    return out, lse / math.log(2)


def rows_before_heads(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = bottom_right(q, k, v, scale=scale, causal=causal)
    return out, lse.transpose(1, 2)


def lse_of_unscaled_scores(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return bottom_right(q, k, v, scale=scale, causal=causal)[0], bottom_right(q, k, v, scale=1.0, causal=causal)[1]


def half_precision_lse(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = bottom_right(q, k, v, scale=scale, causal=causal)
    return out, lse.half()


def heads_modulo(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Query head h served by key/value head h modulo K, not h divided by the group."""
    groups = q.shape[2] // k.shape[2]
    return bottom_right(q, k.repeat(1, 1, groups, 1), v.repeat(1, 1, groups, 1), scale=scale, causal=causal)


WRONG = [top_left, base_two, rows_before_heads, lse_of_unscaled_scores, half_precision_lse, heads_modulo]


class ForgetfulPlain(type(EAGER)):
    """Replaces the running result instead of adding to it."""

    def accumulate_(self, out, lse, *block):
        for running, new in zip((out, lse), self.attend(*block, torch.float32), strict=True):
            running.copy_(new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_the_self_test_accepts_a_kernel_of_the_right_convention(head_dim, dtype):
    assert self_test(Aligned("right", bottom_right), CPU, dtype, head_dim, False, False) is None


@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize("capped", [True, False])
def test_the_self_test_accepts_the_eager_path_for_all_that_models_ask(windowed, capped):
    assert self_test(EAGER, CPU, torch.bfloat16, 24, windowed, capped) is None


@pytest.mark.parametrize("kernel", WRONG)
def test_the_self_test_catches_a_kernel_of_another_convention(kernel):
    text = (
        f"attention back-end {kernel.__name__} fails its self-test on cpu with torch.float32, head_dim 16: "
        "in a .* its lse or its mask follows another convention"
    )
    with pytest.raises(RuntimeError, match=f"^{text}$"):
        self_test(Aligned(kernel.__name__, kernel), CPU, torch.float32, 16, False, False)


def test_the_self_test_catches_a_running_result_that_is_lost():
    with pytest.raises(RuntimeError, match="in a block folded into a running result"):
        self_test(ForgetfulPlain(), CPU, torch.float32, 16, False, False)


class Counting(Aligned):
    """A back-end that counts its calls, and may not be able to run."""

    def __init__(self, kernel, reason: str | None = None) -> None:
        super().__init__("counting", kernel)
        self.calls, self.reason = 0, reason

    def unusable(self, device):
        self.calls += 1
        return self.reason


def no_kernel(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no kernel supports this")


@pytest.mark.parametrize(
    ("kernel", "reason", "words"),
    [
        (base_two, None, "follows another convention"),
        (no_kernel, None, "no kernel supports this"),
        (bottom_right, "too old", "too old"),
    ],
)
def test_what_cannot_run_is_named_in_one_warning(caplog, kernel, reason, words):
    backend = Counting(kernel, reason)
    with caplog.at_level(logging.WARNING, "ds_ring"):
        assert [usable(backend, CPU, torch.float32, 16, False, False) for _ in range(3)] == [False] * 3
    assert backend.calls == 1
    assert len(caplog.messages) == 1
    assert "attention at head_dim 16 in torch.float32 goes without counting: " in caplog.messages[0]
    assert words in caplog.messages[0]


def test_what_can_run_is_tested_once_for_each_case(caplog):
    backend = Counting(bottom_right)
    for head_dim in (16, 16, 32):
        assert usable(backend, CPU, torch.float32, head_dim, False, False)
    assert backend.calls == 2
    assert not caplog.messages


def test_a_self_test_without_memory_says_nothing_about_the_back_end():
    def out_of_memory(q, k, v, *, scale, causal):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        usable(Aligned("back-end", out_of_memory), CPU, torch.float32, 16, False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", [PLAIN_SPEC, WINDOWED, CAPPED])
def test_the_cpu_takes_the_eager_path(spec, dtype):
    assert select_backend(torch.zeros(1, 1, 1, 8, dtype=dtype), 1, BlockSpec(spec, True, 0)) is EAGER


class TestOnGpus:
    """With replaced answers for which GPU it is, and for which back-ends can run."""

    @pytest.fixture(autouse=True)
    def capability(self, monkeypatch) -> dict[str, tuple[int, int]]:
        gpu = {"capability": (9, 0)}
        monkeypatch.setattr(select, "_capability", lambda device: gpu["capability"])
        monkeypatch.setattr(select, "_cudnn_max_head_dim", lambda device: 256 if gpu["capability"] == (9, 0) else 128)
        return gpu

    @pytest.fixture
    def unfit(self, monkeypatch) -> set[Backend]:
        unfit: set[Backend] = set()
        monkeypatch.setattr(select, "usable", lambda backend, *rest: backend not in unfit)
        return unfit

    def select_backend(self, head_dim, block=SQUARE, queries=4096, keys=4096, dtype=torch.float16) -> Backend:
        q = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, queries, 4, head_dim))
        return select_backend(q, keys, block)

    @pytest.mark.parametrize(
        ("head_dim", "backend"),
        [(64, CUDNN), (80, CUDNN), (256, CUDNN), (72, CUDNN), (20, TRITON), (320, TRITON), (512, ATTENTION512)],
    )
    def test_the_back_end_follows_the_head_size(self, unfit, head_dim, backend):
        assert self.select_backend(head_dim) is backend

    @pytest.mark.parametrize("head_dim", [20, 64, 320, 512])
    @pytest.mark.parametrize("spec", [WINDOWED, CAPPED])
    def test_windows_and_softcap_take_our_triton_kernel(self, unfit, head_dim, spec):
        assert self.select_backend(head_dim, BlockSpec(spec, True, 0)) is TRITON

    @pytest.mark.parametrize("head_dim", [20, 64, 320, 512])
    def test_fp32_stays_exact(self, unfit, head_dim):
        assert self.select_backend(head_dim, dtype=torch.float32) is EAGER

    @pytest.mark.parametrize(
        ("head_dim", "order"),
        [
            (64, [CUDNN, FLASH, TRITON, EAGER]),
            (20, [TRITON, EAGER]),
            (320, [TRITON, MEMORY_EFFICIENT, EAGER]),
            (512, [ATTENTION512, TRITON, MEMORY_EFFICIENT, EAGER]),
        ],
    )
    def test_what_cannot_run_is_followed_by_the_next(self, unfit, head_dim, order):
        for backend in order:
            assert self.select_backend(head_dim) is backend
            unfit.add(backend)

    @pytest.mark.parametrize(
        ("queries", "keys", "block", "pays"),
        [
            (2500, 2500, SQUARE, True),
            (1250, 2500, FULL, True),
            (511, 2500, FULL, False),
            (2500, 511, FULL, False),
            (2500, 12500, BlockSpec(PLAIN_SPEC, True, 10000), True),
            (2500, 3500, BlockSpec(PLAIN_SPEC, True, 1000), False),
            (2500, 2500, BlockSpec(PLAIN_SPEC, True, -100), False),
            (2500, 2500, BlockSpec(PLAIN_SPEC, True, 100), False),
            (2500, 2500, BlockSpec(PLAIN_SPEC, True, 2500), True),
        ],
    )
    def test_where_cudnn_pays(self, queries, keys, block, pays):
        assert cudnn_pays(torch.device("cuda"), 128, queries, keys, block) is pays

    @pytest.mark.parametrize(("generation", "pays"), [((8, 0), False), ((9, 0), True), ((10, 0), False)])
    def test_wide_heads_go_through_cudnn_on_hopper_only(self, capability, generation, pays):
        capability["capability"] = generation
        assert cudnn_pays(torch.device("cuda"), 256, 4096, 4096, SQUARE) is pays


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 8), (1, 4), (4, 5)])
@pytest.mark.parametrize("causal", [True, False])
def test_a_mask_at_the_first_key_is_brought_to_the_last(queries, keys, causal):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, heads, 8, generator=generator) for n, heads in ((queries, 4), (keys, 2), (keys, 2)))
    spec, backend = AttentionSpec(0.3), AlignedToFirst("first", top_left)
    want = bottom_right(q, k, v, scale=0.3, causal=causal)
    block = BlockSpec(spec, causal, keys - queries)
    memory = torch.full((2, queries + 3, 6, 8), torch.nan)
    into = memory[:, 2 : 2 + queries, 1:5]
    found = backend.attend(q, k, v, block, torch.float32)
    for got in (found, (into, backend.attend_into_(into, q, k, v, block))):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, atol=2e-6, rtol=1e-6)
    assert int(memory.isnan().sum()) == memory.numel() - into.numel()
