"""Attention by positions: the plain path, and the Triton kernel run by Triton's interpreter, against fp64."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
import logging
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.kernels import attention_check, attention_implementations
from benchmarks.kernels.attention_cases import Case as BenchmarkCase
from benchmarks.kernels.attention_cases import make_inputs
from ds_ring.attention.backends import eager, eager_positions, positions
from ds_ring.attention.backends.positions import EMPTY, attend_positions, kernel_usable
from ds_ring.attention.backends.selftest import self_test_positions
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.kernels import decode, decode_kernel
from tests.helpers.interpreted import INTERPRETED
from tests.helpers.random_blocks import RandomBlock

PATHS = ["plain", pytest.param("kernel", marks=INTERPRETED)]
NAN = float("nan")


@dataclass(frozen=True)
class Case(RandomBlock):
    """Queries at the last positions before ``behind`` more keys, against keys at positions in any order."""

    n_queries: int = 1
    n_keys: int = 71
    behind: int = 0
    empty: float = 0.0
    ordered: bool = False

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the positions; empty slots hold NaN."""
        generator = torch.Generator().manual_seed(self.seed)
        q, k, v = self.qkv(generator, dtype)
        first = self.n_keys - self.n_queries - self.behind
        q_positions = torch.arange(first, first + self.n_queries, dtype=torch.int32).expand(self.batch, -1)
        orders = [torch.randperm(self.n_keys, generator=generator) for _ in range(self.batch)]
        k_positions = torch.stack([order.sort().values if self.ordered else order for order in orders]).int()
        gone = torch.rand(k_positions.shape, generator=generator) < self.empty
        k_positions[gone] = EMPTY
        k[gone], v[gone] = NAN, NAN
        return q, k, v, q_positions, k_positions

    def attend(self, path: str, q, k, v, q_positions, k_positions, out_dtype=None) -> tuple[Tensor, Tensor]:
        where = {"q_positions_BL": q_positions, "k_positions_BS": k_positions}
        if path == "plain":
            return eager_positions.attention(q, k, v, **where, spec=self.spec, out_dtype=out_dtype)
        return decode.attention(
            q, k, v, **where, scale=self.spec.scale, window=self.window, softcap=self.softcap, out_dtype=out_dtype
        )


def reference(case: Case, q, k, v, q_positions, k_positions) -> tuple[Tensor, Tensor]:
    """fp64, a query at a time, over the keys that it sees and no others."""
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            at = int(q_positions[b, i])
            seen = [j for j, p in enumerate(k_positions[b].tolist()) if p <= at and p > at - (case.window or EMPTY)]
            if case.window == 0 or not seen:
                continue
            one = q[b : b + 1, i : i + 1], k[b : b + 1, seen], v[b : b + 1, seen]
            spec = replace(case.spec, window=None)
            part, part_lse = reference_attention(*one, spec=spec, causal=False)
            out[b, i], lse[b, i] = part[0, 0], part_lse[0, :, 0]
    return out, lse.transpose(1, 2)


def assert_is(got, want, tolerance: float = 3e-6, softcap: float | None = None) -> None:
    """A capped score is a difference of numbers as large as the cap, each off by a few units of rounding of that."""
    rounding = 4 * torch.finfo(torch.float32).eps * (softcap or 0.0)
    (out, lse), (want_out, want_lse) = got, want
    assert out.shape == want_out.shape
    assert lse.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    tolerance += rounding
    torch.testing.assert_close(out.double(), want_out.double(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse.double(), atol=1e-5 + rounding, rtol=2e-6)


@pytest.fixture(autouse=True, scope="module")
def small_steps():
    """Splits, scans and groups of scores that short sequences have several of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_kernel, "SPLIT_UNIT", 16)
        patch.setattr(decode_kernel, "MIN_SPLIT", 32)
        patch.setattr(eager, "SCORES_LIMIT", 300)
        yield


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs and partial results hold NaN wherever the kernels leave them unwritten."""
    outputs, empty = decode._outputs, torch.empty
    monkeypatch.setattr(decode, "_outputs", lambda *args: tuple(t.fill_(NAN) for t in outputs(*args)))

    def filled(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(NAN) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(decode_kernel.torch, "empty", filled)


cases = st.builds(
    Case,
    batch=st.integers(1, 2),
    n_queries=st.integers(1, 20),
    n_keys=st.integers(1, 130),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    behind=st.integers(-5, 60),
    empty=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    ordered=st.booleans(),
    window=st.none() | st.integers(0, 60),
    softcap=st.none() | st.floats(0.5, 50.0),
    seed=st.integers(0, 1000),
)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=20, deadline=None)
@given(case=cases)
def test_it_is_reference_attention(path, case):
    tensors = case.tensors()
    assert_is(case.attend(path, *tensors), reference(case, *tensors), softcap=case.softcap)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str)
@settings(max_examples=5, deadline=None)
@given(case=cases)
def test_half_precision_loses_no_more_than_the_rounding_of_weights_and_output(dtype, tolerance, path, case):
    tensors = case.tensors(dtype)
    out, lse = case.attend(path, *tensors)
    assert out.dtype == dtype
    assert_is((out, lse), reference(case, *tensors), tolerance, case.softcap)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("live", [0, 1, 16, 33, 100, 150])
def test_a_cache_that_is_filled_from_the_front(path, splits, live, monkeypatch):
    """Behind the live keys come empty slots: whole splits see nothing, and one ends in the middle of a block."""
    monkeypatch.setattr(decode_kernel, "PROGRAMS_PER_SM", splits)
    case = Case(n_keys=150, ordered=True)
    q, k, v, q_positions, k_positions = case.tensors()
    k_positions[:, live:] = EMPTY
    k[:, live:], v[:, live:] = NAN, NAN
    assert decode_kernel.split_length(150, 1, 1) == {1: 160, 2: 80, 5: 32}[splits]
    tensors = q, k, v, q_positions, k_positions
    assert_is(case.attend(path, *tensors), reference(case, *tensors))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("holes", [[(0, 40)], [(20, 60), (61, 90)], [(7, 8)], [(15, 17), (48, 64), (100, 128)]])
def test_holes_of_empty_slots_anywhere(path, holes):
    case = Case(batch=2, n_keys=128, ordered=True, group=3)
    q, k, v, q_positions, k_positions = case.tensors()
    for start, stop in holes:
        k_positions[0, start:stop] = EMPTY
        k[0, start:stop], v[0, start:stop] = NAN, NAN
    tensors = q, k, v, q_positions, k_positions
    assert_is(case.attend(path, *tensors), reference(case, *tensors))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [None, 1, 16, 20])
def test_each_row_of_the_batch_stands_at_its_own_length(path, window):
    case = Case(batch=3, n_queries=2, n_keys=90, window=window, kv_heads=2)
    q, k, v, _, k_positions = case.tensors()
    q_positions = torch.tensor([[88, 89], [3, 4], [-7, 40]], dtype=torch.int32)  # one query sees nothing
    tensors = q, k, v, q_positions, k_positions
    got = case.attend(path, *tensors)
    assert_is(got, reference(case, *tensors))
    assert not got[0][2, 0].any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("n_queries", "group"), [(1, 16), (1, 17), (9, 4), (40, 1)])
def test_more_rows_than_a_tile_holds(path, n_queries, group):
    case = Case(n_queries=n_queries, group=group, n_keys=80, ordered=True, empty=0.05)
    tensors = case.tensors()
    assert_is(case.attend(path, *tensors), reference(case, *tensors))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("head_dim", [1, 80, 112, 300])
def test_head_sizes(path, head_dim):
    case = Case(n_keys=70, head_dim=head_dim, kv_heads=2, empty=0.1)
    tensors = case.tensors()
    assert_is(case.attend(path, *tensors), reference(case, *tensors), 1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_tensors_of_any_strides(path):
    case = Case(batch=2, n_queries=3, n_keys=50, kv_heads=2)
    q, k, v, q_positions, k_positions = case.tensors()
    want = reference(case, q, k, v, q_positions, k_positions)
    cache = torch.stack((k, v)).transpose(2, 3).contiguous().transpose(2, 3)  # heads before tokens, k beside v
    strided_positions = torch.stack((k_positions, k_positions), dim=2)[:, :, 0]
    transposed_positions = q_positions.t().contiguous().t()
    got = case.attend(path, q, *cache, transposed_positions, strided_positions)
    assert_is(got, want)
    last_dim_strided = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    assert_is(case.attend(path, *last_dim_strided, q_positions, k_positions), want)


@pytest.mark.parametrize("path", PATHS)
def test_dtypes_of_the_output(path):
    case = Case(n_keys=40)
    half = case.tensors(torch.float16)
    assert case.attend(path, *half, out_dtype=torch.float32)[0].dtype == torch.float32
    assert case.attend(path, *case.tensors(), out_dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("batch", "n_queries", "n_keys"), [(0, 1, 5), (1, 0, 5), (1, 2, 0), (2, 1, 0)])
def test_no_queries_and_no_keys(path, batch, n_queries, n_keys):
    q, k = torch.zeros(batch, n_queries, 4, 8), torch.zeros(batch, n_keys, 2, 8)
    where = torch.zeros(batch, n_queries).int(), torch.zeros(batch, n_keys).int()
    out, lse = Case(head_dim=8).attend(path, q, k, k, *where)
    assert (out.shape, lse.shape) == (q.shape, (batch, 4, n_queries))
    assert not out.any()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("path", PATHS)
def test_repeats_are_bit_equal(path):
    case = Case(batch=2, n_queries=2, n_keys=130, window=90, softcap=10.0, empty=0.1)
    tensors = case.tensors(torch.float16)
    first = case.attend(path, *tensors)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(case.attend(path, *tensors), first, strict=True))


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@pytest.mark.parametrize("path", PATHS)
def test_a_nan_reaches_the_queries_that_see_it(path):
    case = Case(batch=2, n_keys=100)
    for poisoned in range(3):
        tensors = case.tensors()
        tensors[poisoned][0, 0] = NAN
        tensors[4][0, 0] = 5
        out, lse = case.attend(path, *tensors)
        assert torch.isnan(out[0]).all()
        assert torch.isfinite(out[1]).all()
        assert torch.isfinite(lse[1]).all()


def test_groups_of_query_heads_repeat_no_key(monkeypatch):
    """The plain path's largest tensors are a group of scores and a few keys, whatever the cache and the group."""
    monkeypatch.setattr(eager_positions, "MAX_KEYS", 64)
    case = Case(n_keys=640, group=8, head_dim=4)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result._base is None and not func.is_view:
                sizes.append(result.numel())
            return result

    tensors = case.tensors()
    with Watch():
        case.attend("plain", *tensors)
    assert 0 < max(sizes) <= max(eager.SCORES_LIMIT, 64 * case.group)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(1, 6, 2, 8)}, "do not fit together"),
        ({"q": torch.zeros(1, 4, 3, 8)}, "do not fit together"),
        ({"q": torch.zeros(1, 4, 2, 8, dtype=torch.float16)}, "not all fp16, bf16 or fp32"),
        ({"scale": 0.0}, "have to be positive"),
        ({"q_positions_BL": torch.zeros(1, 5).int()}, "positions"),
        ({"k_positions_BS": torch.zeros(1, 5)}, "not int32"),
        ({name: torch.zeros(1, 4, 2, 513) for name in "qkv"}, "head_dim 513 is not in 1 .. 512"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"q": torch.zeros(1, 4, 2, 8), "k": torch.zeros(1, 5, 2, 8), "v": torch.zeros(1, 5, 2, 8), "scale": 1.0}
    given |= {"q_positions_BL": torch.zeros(1, 4).int(), "k_positions_BS": torch.zeros(1, 5).int()} | change
    q, k, v = (given.pop(name) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        decode.attention(q, k, v, **given)


@pytest.mark.parametrize("mark", [pytest.param(None, marks=INTERPRETED)])
def test_the_benchmark_can_time_any_tile(mark):
    inputs = make_inputs(BenchmarkCase(8, False, 2, 4, 2, 1, 33, "decode"), torch.device("cpu"))
    out, lse = attention_implementations._with_tile((16, 32, 4, 1), inputs).call()
    assert max(attention_check.errors(out, lse, inputs, False)) < 1e-5


@pytest.mark.parametrize("mark", [pytest.param(None, marks=INTERPRETED)])
def test_the_operator_keeps_its_promises_to_pytorch(mark):
    case = Case(n_keys=40, window=30, softcap=9.0)
    torch.library.opcheck(decode.decode_attention, (*case.tensors(torch.float16), 0.25, 30, 9.0, torch.float32))
    tensors = case.tensors()
    compiled = torch.compile(lambda *args: case.attend("kernel", *args), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*tensors), case.attend("kernel", *tensors), strict=True):
        assert torch.equal(got, want)


class TestChoice:
    @pytest.fixture(autouse=True)
    def fresh(self):
        kernel_usable.cache_clear()
        yield
        kernel_usable.cache_clear()

    def test_a_cpu_takes_the_plain_path(self, monkeypatch):
        monkeypatch.setattr(decode, "attention", lambda *args, **options: pytest.fail("the kernel"))
        case = Case(n_queries=3, window=40)
        q, k, v, q_positions, k_positions = tensors = case.tensors()
        where = {"q_positions_BL": q_positions, "k_positions_BS": k_positions}
        assert_is(attend_positions(q, k, v, **where, spec=case.spec), reference(case, *tensors))

    @pytest.mark.parametrize("features", [(False, False), (True, True)])
    def test_the_self_test_passes_what_is_right(self, features):
        def right(q, k, v, *, scale, window, softcap, **where):
            return eager_positions.attention(q, k, v, spec=AttentionSpec(scale, window, softcap), **where)

        self_test_positions(right, torch.device("cpu"), torch.float16, 8, *features)

    @pytest.mark.parametrize("wrong", ["window", "lse", "heads", "later keys", "nan"])
    def test_the_self_test_fails_what_is_wrong_and_a_warning_names_it(self, wrong, monkeypatch, caplog):
        def kernel(q, k, v, *, scale, window, softcap, q_positions_BL, k_positions_BS):
            spec = AttentionSpec(scale, window + 1 if wrong == "window" else window, softcap)
            if wrong == "heads":
                q = q.flip(2)
            if wrong == "later keys":
                q_positions_BL = q_positions_BL - 1
            where = {"q_positions_BL": q_positions_BL, "k_positions_BS": k_positions_BS}
            out, lse = eager_positions.attention(q, k, v, spec=spec, **where)
            return out * NAN if wrong == "nan" else out, lse / math.log(2) if wrong == "lse" else lse

        monkeypatch.setattr(positions.decode, "attention", kernel)
        monkeypatch.setattr(positions.decode, "unavailable", lambda device: None)
        with caplog.at_level(logging.WARNING, "ds_ring"):
            assert [kernel_usable(torch.device("cpu"), torch.float32, 16, True, False) for _ in range(2)] == [False] * 2
        assert len(caplog.records) == 1
        assert "fails its self-test" in caplog.text

    def test_a_capture_before_the_first_call_says_so_and_decides_nothing(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="call it once before"):
                kernel_usable(torch.device("cuda"), torch.float16, 16, False, False)
