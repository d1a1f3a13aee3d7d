"""Attention by positions against fp64: the eager path, and the Triton kernel run by Triton's interpreter."""

import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ds_ring.attention.backends import eager, eager_positions
from ds_ring.attention.backends.positions import EMPTY
from ds_ring.kernels import decode, decode_kernel
from tests.helpers.decode_cases import NAN, Case, assert_is, cases, reference
from tests.helpers.triton_interpreter import INTERPRETED

pytestmark = pytest.mark.usefixtures("small_steps")
PATHS = ["eager", pytest.param("kernel", marks=INTERPRETED)]


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs and partial results hold NaN wherever the kernels leave them unwritten."""
    outputs, empty = decode._outputs, torch.empty
    monkeypatch.setattr(decode, "_outputs", lambda *args: tuple(t.fill_(NAN) for t in outputs(*args)))

    def filled(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(NAN) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(decode_kernel.torch, "empty", filled)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=20)
@given(case=cases)
def test_it_is_reference_attention(path, case):
    tensors = case.tensors()
    assert_is(case.attend(path, *tensors), reference(case, *tensors), softcap=case.softcap)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str)
@settings(max_examples=5)
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
    """After the live keys come empty slots: whole splits see nothing, and one ends in the middle of a block."""
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
def test_each_sequence_of_the_batch_has_its_own_length(path, window):
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
    """The eager path's largest tensors are a group of scores and a few keys, whatever the cache and the group."""
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
        case.attend("eager", *tensors)
    assert 0 < max(sizes) <= max(eager.SCORES_LIMIT, 64 * case.group)
