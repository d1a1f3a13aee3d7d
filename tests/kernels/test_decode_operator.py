"""The operator around the decode kernel: what it refuses, and whether the kernel or the eager path is taken."""

import logging
import math

import pytest
import torch

from benchmarks.kernels import attention_check, attention_implementations
from benchmarks.kernels.attention_cases import Case as BenchmarkCase
from benchmarks.kernels.attention_cases import make_inputs
from ds_ring.attention.backends import eager_positions, positions
from ds_ring.attention.backends.positions import attend_positions, kernel_usable
from ds_ring.attention.backends.selftest import self_test_positions
from ds_ring.attention.spec import AttentionSpec
from ds_ring.kernels import decode
from tests.helpers.decode_cases import NAN, Case, assert_is, reference
from tests.helpers.triton_interpreter import INTERPRETED

pytestmark = pytest.mark.usefixtures("small_steps")


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


class TestSelection:
    @pytest.fixture(autouse=True)
    def fresh(self):
        kernel_usable.cache_clear()
        yield
        kernel_usable.cache_clear()

    def test_a_cpu_takes_the_eager_path(self, monkeypatch):
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
