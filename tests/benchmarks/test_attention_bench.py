"""The attention benchmark on a CPU with tiny cases: FLOPs, timing on a mocked clock, and the rows it makes."""

import itertools
import statistics
import types
from functools import partial

import pytest
import torch

from benchmarks.kernels import attention_cases, attention_flex, attention_implementations, attention_timing
from benchmarks.kernels.attention_cases import KINDS, Case, default_cases, make_inputs, select, zigzag_rank
from benchmarks.kernels.attention_run import run
from benchmarks.reports.kernel_tables import attention_cells, fastest_baseline
from ds_ring.attention.block import attend
from ds_ring.attention.spec import AttentionSpec
from ds_ring.errors import DsRingError

CPU = torch.device("cpu")
TINY = [
    Case(8, False, 2, 4, 4, 9, 9),
    Case(8, True, 2, 4, 2, 70, 70),
    Case(8, False, 2, 2, 2, 5, 10, "zigzag half block"),
    Case(8, False, 2, 4, 2, 5, 10, "carry"),
    zigzag_rank(8, 2, 4, 40, 2),
    zigzag_rank(8, 1, 2, 83, 4),
    Case(8, False, 2, 2, 2, 10, 5, "zigzag half block"),
    Case(8, False, 2, 4, 2, 1, 33, "decode"),
]


def tiny_rows(selected=TINY, **options):
    silent = options.pop("report", lambda line: None)
    return list(run(selected, CPU, 0.002, silent, gemm=(16, 16, 16), **options))


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)


@pytest.mark.parametrize("case", [*TINY, Case(8, True, 2, 3, 1, 3, 8), Case(8, True, 1, 1, 1, 1, 4)], ids=str)
def test_flops_count_every_visible_pair_once(case):
    positions = [position for own in case.ranges for position in range(own.start, own.stop)]
    assert len(positions) == case.seq_q
    pairs = itertools.product(positions, range(case.seq_k))
    visible = sum(1 for i, j in pairs if not case.causal or j <= i)
    assert case.flops == 4 * case.batch * case.heads * case.head_dim * visible


def test_a_zigzag_rank_is_one_of_the_layout_and_sees_its_keys_only():
    for case in (c for c in [*TINY, *default_cases()] if c.ranks > 1):
        assert case.seq_k == case.ranges[-1].stop
        shares = [zigzag_share(case, rank) for rank in range(case.ranks)]
        assert set(shares) == {case.flops}, "ranks do not work equally"


def zigzag_share(case, rank):
    positions = case.layout.slice_positions(rank)
    return 4 * case.batch * case.heads * case.head_dim * sum(position + 1 for position in positions)


def test_default_cases_differ_by_name_and_cover_every_kind():
    found = default_cases()
    assert len({case.label for case in found}) == len(found)
    assert {case.kind for case in found} == set(KINDS)
    assert {case.heads * case.head_dim for case in found if case.heads == case.kv_heads} == {8192}


def test_default_cases_are_the_whole_grid_of_head_sizes_lengths_and_shapes():
    found = {(c.kind, c.head_dim, c.causal, c.seq_q, c.seq_k) for c in default_cases() if c.heads == c.kv_heads}
    for head_dim, length in itertools.product((64, 128, 256, 512), (2500, 10_000, 32_768)):
        half = length // 2
        assert {("self", head_dim, causal, length, length) for causal in (False, True)} <= found
        assert {("zigzag half block", head_dim, False, *shape) for shape in ((half, length), (length, half))} <= found
        assert ("decode", head_dim, False, 1, length) in found


def test_filters_narrow_by_words_and_widen_by_kinds():
    found = default_cases()
    assert select(found) == found
    assert select(found, ["d512", "causal"]) == [c for c in found if c.head_dim == 512 and c.causal]
    assert {c.kind for c in select(found, [], ["carry", "decode"])} == {"carry", "decode"}
    assert {c.kind for c in select(found, [], ["zigzag"])} == {"zigzag half block", "zigzag rank"}
    assert select(found, ["d512"], ["nothing"]) == []


class FakeDevice:
    """A clock that only calls move, and a log of what the host did."""

    def __init__(self):
        self.now, self.marks, self.waits = 0.0, 0, []

    def call(self, *durations):
        endless = itertools.cycle(durations)

        def one():
            self.now += next(endless)

        return one

    def mark(self):
        self.marks += 1
        return self.marks, self.now

    def seconds(self, start, stop):
        self.waits.append(self.marks - stop[0])
        return stop[1] - start[1]


def test_each_call_is_sustained_in_turn_with_the_product():
    device = FakeDevice()
    call, product = attention_timing.time_in_turn(device.call(0.0002), device.call(0.006), 2.0, CPU, device)
    assert call.seconds == pytest.approx(0.0002)
    assert product.seconds == pytest.approx(0.006)
    assert 2.0 <= call.sustained < 2.5
    assert 2.0 <= product.sustained < 2.5
    assert len(call.gpu) == len(product.gpu) == 4
    assert call.calls_per_chunk == 250, "short calls are to share a mark"


def test_a_slow_call_is_marked_every_time_and_its_median_reported():
    device = FakeDevice()
    slow = device.call(0.2, 0.2, 0.3)
    timed, _ = attention_timing.time_in_turn(slow, device.call(0.006), 2.0, CPU, device)
    assert timed.calls_per_chunk == 1
    assert timed.seconds == statistics.median(timed.chunks) == pytest.approx(0.2)


def test_the_host_waits_for_a_chunk_only_when_the_next_is_queued():
    device = FakeDevice()
    chunks = attention_timing.sustain(device.call(0.01), 5, 1.0, device)
    assert sum(chunks) * 5 >= 1.0
    assert set(device.waits[:-1]) == {1}
    assert device.waits[-1] == 0


def test_sensors_are_the_median_over_a_calls_own_blocks():
    timed = attention_timing.Timed(lambda: None, 1, gpu=[{"power_w": 1.0}, {}, {"power_w": 3.0}, {"power_w": 8.0}])
    assert timed.sensor("power_w") == 3.0
    assert timed.sensor("sm_clock_mhz") is None


@pytest.mark.usefixtures("uncompiled")
def test_every_kind_gives_full_and_right_rows():
    rows = tiny_rows()
    assert {row["case"] for row in rows} == {case.label for case in TINY}
    for row in rows:
        assert "error" not in row
        assert row["rel_error"] < 1e-5, row
        assert row["lse_error"] is None or row["lse_error"] < 1e-5, row
        assert (row["gbps"] is not None) == (row["kind"] == "decode")
        assert row["share"] == pytest.approx(row["tflops"] / row["gemm_tflops"])
        assert {"sm_clock_mhz", "power_w", "gemm_clock_mhz", "gemm_power_w", "detail", "ranks"} <= row.keys()
    assert {"sdpa math", "ds_ring"} <= {row["impl"] for row in rows if row["kind"] == "self"}


def test_decoding_goes_by_positions_and_is_held_against_the_block_path(monkeypatch):
    def block_path(*args, **options):
        raise RuntimeError("the block path")

    monkeypatch.setattr(attention_implementations, "attend", block_path)
    rows = {row["impl"]: row for row in tiny_rows(TINY[-1:], names=["ds_ring"])}
    assert rows["ds_ring"]["detail"] == "plain PyTorch"
    assert rows["ds_ring"]["rel_error"] < 1e-5
    assert "the block path" in rows["ds_ring block"]["error"]


@pytest.mark.usefixtures("uncompiled")
def test_costs_of_the_state_are_differences_within_the_case():
    without, carried, merged = tiny_rows([TINY[3]])
    assert [without["impl"], carried["impl"], merged["impl"]] == ["ds_ring, no state", "ds_ring", "ds_ring + merge"]
    assert carried["carry_cost_ms"] == carried["ms"] - without["ms"]
    assert merged["merge_cost_ms"] == merged["ms"] - without["ms"]


def test_what_fails_is_a_row_and_the_rest_still_run():
    def broken(inputs):
        raise RuntimeError("\n  no such kernel\nand much more")

    def not_finite(inputs):
        return attention_implementations.Prepared(lambda: (torch.full_like(inputs.q, torch.nan), None))

    def offered(case, device):
        return {"broken": broken, "nan": not_finite, **attention_implementations.implementations(case, device)}

    rows = {row["impl"]: row for row in tiny_rows(TINY[:1], offered=offered)}
    assert rows["broken"]["error"] == "RuntimeError: no such kernel"
    assert "not finite" in rows["nan"]["error"]
    assert "ms" not in rows["broken"]
    assert rows["ds_ring"]["rel_error"] < 1e-5


def test_a_case_whose_tensors_do_not_fit_is_a_row(monkeypatch):
    def full(case, device):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("benchmarks.kernels.attention_run.make_inputs", full)
    rows = tiny_rows(TINY[:1])
    assert rows
    assert all(row["error"] == "OutOfMemoryError: no room" for row in rows)


def test_a_wrong_mask_shows_in_the_error():
    def first_key(inputs):
        q, k, v = (t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return attention_implementations.Prepared(lambda: (out.transpose(1, 2), None))

    (row,) = tiny_rows([Case(8, True, 1, 2, 1, 6, 12)], offered=lambda *_: {"first key": first_key})
    assert row["rel_error"] > 0.1


def test_implementations_are_chosen_by_name():
    assert [row["impl"] for row in tiny_rows(TINY[:1], names=["math"])] == ["sdpa math"]
    assert tiny_rows(TINY[:1], names=["nothing"]) == []


def test_blocks_make_up_a_zigzag_rank():
    def block(q, k, v, scale, causal):
        return attend(q, k, v, spec=AttentionSpec(scale), causal=causal, q_offset=k.shape[1] - q.shape[1])

    (row,) = tiny_rows([TINY[5]], offered=lambda *_: {"blocks": partial(attention_implementations._by_blocks, block)})
    assert row["rel_error"] < 1e-5
    assert row["lse_error"] < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("case", [case for case in TINY if case.kind != "carry"], ids=str)
def test_flex_sees_what_the_case_says(case, monkeypatch):
    monkeypatch.setattr(attention_flex, "quick_seconds", lambda call, watch: 1.0)
    (row,) = tiny_rows([case], offered=lambda *_: {"flex": attention_implementations._flex})
    assert row["rel_error"] < 1e-5
    assert row["lse_error"] < 1e-5


def test_flex_takes_the_fastest_option_and_leaves_out_those_that_raise(monkeypatch):
    seconds = iter([3.0, None, 1.0, 2.0])

    def timed(call, watch):
        found = next(seconds)
        if found is None:
            raise RuntimeError("out of shared memory")
        return found

    monkeypatch.setattr(attention_flex, "quick_seconds", timed)
    inputs = make_inputs(Case(64, False, 1, 1, 1, 4, 4), CPU)
    assert attention_flex.tuned(inputs)[1] == attention_flex.OPTIONS[64][2]


def test_flex_fails_when_no_option_works(monkeypatch):
    def raises(call, watch):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(attention_flex, "quick_seconds", raises)
    with pytest.raises(DsRingError, match=r"no option works.*shared memory"):
        attention_flex.tuned(make_inputs(Case(64, False, 1, 1, 1, 4, 4), CPU))


def test_what_a_gpu_is_offered(monkeypatch):
    monkeypatch.setattr(attention_implementations.triton_attention, "unavailable", lambda device: None)
    monkeypatch.setattr(
        attention_implementations, "_module", lambda name: types.SimpleNamespace() if name == "flash_attn" else None
    )

    def names(case):
        return set(attention_implementations.implementations(case, torch.device("cuda")))

    always = {"sdpa memory_efficient", "flex", "ds_ring", "ds_ring triton"}
    assert names(Case(512, True, 1, 1, 1, 9, 9)) == always
    assert names(Case(256, True, 1, 1, 1, 9, 9)) == always | {"sdpa flash", "sdpa cudnn", "flash-attn"}
    assert names(zigzag_rank(128, 1, 1, 40, 2)) == always | {"sdpa flash", "flash-attn"}
    decoding = names(Case(512, False, 1, 8, 2, 1, 9, "decode"))
    assert decoding >= always | {"ds_ring block"}
    assert len([name for name in decoding if name.startswith("ds_ring 16x32 ")]) > 2


def test_flash_attn_packages_are_called_as_they_ask(monkeypatch):
    def result(q, k, v, softmax_scale, causal):
        return attend(q, k, v, spec=AttentionSpec(softmax_scale), causal=causal)

    def two(q, k, v, softmax_scale, causal, return_attn_probs):
        assert return_attn_probs
        return (*result(q, k, v, softmax_scale, causal), None)

    fakes = {"flash_attn": two, "flash_attn_interface": result}
    monkeypatch.setattr(
        attention_implementations, "_module", lambda name: types.SimpleNamespace(flash_attn_func=fakes[name])
    )
    rows = tiny_rows([TINY[1]], offered=lambda *_: attention_implementations._flash_attn_packages())
    assert [row["impl"] for row in rows] == ["flash-attn", "flash-attn 3"]
    assert all(row["rel_error"] < 1e-5 and row["lse_error"] < 1e-5 for row in rows)


def test_the_fastest_baseline_is_one_that_is_right_and_not_ours():
    def row(impl, **rest):
        figures = {"ms": 1.0, "tflops": 2.0, "share": 0.5, "rel_error": 1e-4, "lse_error": None, "detail": ""}
        return {"case": "a case", "impl": impl, **(rest if "error" in rest else figures | rest)}

    slow, quick, wrong = row("slow", ms=3.0), row("quick", ms=2.0), row("wrong", ms=1.0, rel_error=0.5)
    ours, broken = row("ds_ring", carry_cost_ms=0.25, detail="eager"), row("broken", error="RuntimeError: no kernel")
    assert fastest_baseline([slow, quick, wrong, ours, broken]) is quick
    assert fastest_baseline([wrong, ours, broken]) is None
    assert attention_cells(broken)[-1] == "RuntimeError: no kernel"
    assert "+0.250 ms" in attention_cells(ours)[-1]


def test_labels_name_a_case_in_full():
    assert zigzag_rank(512, 8, 16, 10_000, 16).label == "zigzag rank d512 causal B8 H16/16 626 x 7512 P16"
    assert attention_cases.Case(128, True, 2, 32, 8, 100, 100).label == "self d128 causal B2 H32/8 100 x 100"
