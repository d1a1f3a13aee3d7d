"""The results page: made from what is recorded, from nothing else, and not stale."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks.layouts import compare, latency
from benchmarks.reports import page, record
from benchmarks.reports.manifest import Bar
from benchmarks.reports.targets import judge
from ds_ring.cli import options
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError
from tests.helpers.compared_rows import row as compared
from tests.helpers.compared_rows import timed_row as timed

ROOT = Path(__file__).resolve().parents[2]
PROVENANCE = {
    "command": "made.py --by hand", "git": "abc123", "date": "2001-02-03T04:05:06+00:00",
    "versions": {"torch": "2", "transformers": "5", "deepspeed": "1"},
}  # fmt: skip


def test_the_page_is_what_the_command_writes():
    assert (ROOT / page.PAGE).read_text() == page.text(*page.read(ROOT), ROOT), f"run {page.COMMAND}"


def test_its_pictures_exist():
    names = [name for one in page.read(ROOT)[1] if one.is_measured for name in page.pictures.files(
        one.section, one.documents, one.rows
    )]  # fmt: skip
    assert len(names) == len(set(names)), "two sections draw into one file"
    assert set(names) == {file.name for file in (ROOT / page.PICTURES).iterdir()}


def test_commands_for_what_is_not_measured_can_be_given():
    commands = [c for one in page.read(ROOT)[1] for source in one.missing if (c := source.command)]
    assert commands
    for command in commands:
        words = shlex.split(command)
        script = next(word for word in words if word.startswith("launch/"))
        assert (ROOT / script).is_file()
        parser = options.run_parser(None)
        parser.add_argument("--layouts")
        parser.add_argument("--latency", nargs="+", type=int)
        args, _ = parser.parse_known_args(words[words.index(script) + 1 :])
        if args.layouts:
            files = [str(file) for file in sorted(ROOT.glob(args.layouts))]
            plan = (
                latency.plan if args.latency else lambda files, _, overrides: compare.Comparison.make(files, overrides)
            )
            assert plan(files, args.latency, options.overrides(args)).runs
        else:
            run = RunConfig.load(ROOT / args.config if args.config else None, **options.overrides(args))
            if "--num_gpus" in words:
                assert int(words[words.index("--num_gpus") + 1]) == run.topology.world_size


@pytest.fixture
def root(tmp_path):
    """Makes a repository with the given sections and records, and returns its page."""

    def make(sections, **records):
        for name, document in records.items():
            file = tmp_path / page.RESULTS / f"{name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(PROVENANCE | document))
        manifest = tmp_path / page.MANIFEST
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"introduction": "By hand.", "sections": sections}))
        summary = page.write(tmp_path)
        assert (tmp_path / page.PAGE).read_text() == page.text(*page.read(tmp_path), tmp_path)
        return (tmp_path / page.PAGE).read_text(), summary

    return make


def section(kind, *names, **more):
    sources = [{"file": f"{name}.json", "command": f"make {name}"} for name in names]
    return {"title": f"About {kind}", "kind": kind, "sources": sources} | more


def forward_row(**more):
    return {
        "layout": "single", "gpus": 1, "mode": "full", "fusion": "auto", "batch": 8, "length": 10000, "tps": 1000.0,
        "mfu": 0.5, "step_ms": 80.0, "step_spread": 0.01, "peak_memory_gib": 7.25, "device": "a GPU",
    } | more  # fmt: skip


def test_a_forward_and_where_it_goes(root):
    traced = {"trace_window_ms": 100.0, "trace_gemm_ms": 75.0, "trace_attention_ms": 20.0, "trace_idle_ms": 0.0}
    rows = [forward_row(sm_clock_mhz=1300, power_w=700.4, **traced), forward_row(mode="prefill_only", tps=1250.0)]
    text, summary = root([section("forward", "one")], one={"rows": rows})
    assert "| layers fused, B = 8, L = 10,000, full | 1,000 | 50.0 % | 80.0 | 1.0 % | 7.2 | 1300 | 700 |" in text
    assert "| layers fused, B = 8, L = 10,000, prefill only | 1,250 | 50.0 % | 80.0 | 1.0 % | 7.2 | - | - |" in text
    assert "|  | pass (ms) | matrix products | attention |\n" in text
    assert "| 100.0 | 75.0 ms (75.0 %) | 20.0 ms (20.0 %) |" in text
    assert (
        "`benchmarks/results/one.json`: `made.py --by hand`; a GPU; 1300 MHz; 700 W; commit abc123; 2001-02-03" in text
    )
    assert "performance/one.png" in text
    assert summary == {
        "page": "docs/performance.md", "sections": ["About forward"], "met": [], "missed": [], "not_measured": []
    }  # fmt: skip


def test_transfers_there_and_back(root):
    def row(phase, traffic, nbytes, ms, **more):
        return {
            "phase": phase, "traffic": traffic, "nbytes": nbytes, "layer_ms": ms, "transfer_ms": nbytes / 2**21,
            "sm_clock_mhz": 1300, "power_w": 700, "link_awake": 0.0,
        } | more  # fmt: skip

    rows = [
        row("warming", "nothing", 0, 99.0, second=1), row("there", "nothing", 0, 19.0),
        row("there", "a lot", 2**21, 20.0), row("back", "a lot", 2**21, 22.0, link_awake=1.0),
        row("back", "nothing", 0, 21.0),
    ]  # fmt: skip
    text, _ = root([section("transfers", "one")], one={"rows": rows, "link_sleeps_after_ms": 0.5})
    assert "| nothing | 0 | 0.00 | 20.00 | +0.0 % | 1300 | 700 | 0% |" in text
    assert "| a lot | 2 | 1.00 | 21.00 | +5.0 % | 1300 | 700 | 50% |" in text
    assert "A link goes to sleep after 0.5 ms without traffic." in text


def attention_row(impl, share, **more):
    return {
        "case": "a case", "impl": impl, "ms": 1.0 / share, "tflops": 600 * share, "share": share, "rel_error": 3e-4,
        "lse_error": None, "sm_clock_mhz": 1400.0, "power_w": 700.0, "detail": "",
    } | more  # fmt: skip


def test_attention_with_what_was_wanted(root):
    wanted = [
        {"what": "ours", "figure": "share", "of": {"case": "a case", "impl": "ds_ring"}, "at_least": 0.9},
        {"what": "error", "figure": "rel_error", "of": {"case": "a case"}, "at_most": 4e-4},
        {"what": "elsewhere", "figure": "share", "of": {"case": "another"}, "at_least": 0.5},
    ]
    rows = [
        attention_row("ds_ring", 0.72),
        attention_row("sdpa", 0.2),
        {"case": "a case", "impl": "flex", "error": "no"},
    ]
    text, summary = root([section("attention", "kernel", bars=wanted)], kernel={"device": "a GPU", "rows": rows})
    assert "| a case | ds_ring | 1.389 | 432.0 | 0.72 | 3.0e-04 | 1400 | 700 |  |" in text
    assert "|  | sdpa * | 5.000 |" in text
    assert "|  | flex | - | - | - | - | - | - | no |" in text
    assert "| ours | 0.72 | ≥ 0.9 | **missed** by 20.0 % |" in text
    assert "| error | 0.0003 | ≤ 0.0004 | met |" in text
    assert "| elsewhere | - | ≥ 0.5 | not measured |" in text
    assert (summary["met"], summary["missed"]) == (["error"], ["ours"])


def test_reading_a_cache_is_no_arithmetic(root):
    rows = [attention_row("ds_ring", 0.004, gbps=3000.0), attention_row("ds_ring tile", 0.004, gbps=2000.0)]
    text, _ = root([section("attention", "decode", rows={"impl": ["ds_ring"]})], decode={"rows": rows})
    assert "| case | implementation | ms | GB/s | error |" in text
    assert "| a case | ds_ring | 250.000 | 3,000 |" in text
    assert "tile" not in text


def test_counters_of_a_kernel(root):
    whole = {
        "case": "a case", "flops": 1e12, "ms": 2.5257, "sm_clock_mhz": 1635.8, "tensor_busy": 0.769, "useful": 0.9536,
        "sm_cycles_least": 90.0, "sm_cycles_mean": 95.0, "sm_cycles_most": 100.0, "issue_busy": 0.32, "l2_hit": 0.857,
        "stalls": {"long scoreboard": 0.22, "barrier": 0.18, "wait": 0.17, "gmma": 0.05},
    }  # fmt: skip
    bare = {"case": "another", "flops": 1e12, "ms": 1.0}
    text, _ = root([section("profile", "counted")], counted={"rows": [whole, bare]})
    assert "| case | ms | MHz | tensor | useful | SMs | issue | L2 hits | warps wait for |" in text
    waits = "long scoreboard 22%, barrier 18%, wait 17%"
    assert f"| a case | 2.526 | 1636 | 76.9% | 0.954 | 0.900 / 0.950 | 32% | 86% | {waits} |" in text
    assert "| another | 1.000 | - | - | - | - | - | - |  |" in text
    assert "L1: its data pipe" not in text


def test_generation(root):
    record = {
        "layout": "ring2", "gpus": 2, "device": "a GPU", "ttft_ms": 1234.5, "prefill_tokens_per_second": 81004.0,
        "decode_tpot_ms": 9.876, "decode_over_floor": 1.234, "cache_gib_per_rank": 6.1,
        "decode": "sliced", "config": {"ds_ring": {"parallel": {"decode": "auto"}}},
        "completions": [{"prompt_tokens": 100000, "token_ids": [1, 2, 3], "text": ""}],
    }  # fmt: skip
    text, _ = root([section("generation", "said")], said=record)
    assert "| ring2 | sliced | 2 | 1 | 100,000 | 1,234 | 81,004 | 3 | 9.88 | 1.23 | 6.1 |" in text
    assert "a GPU (2 of a host)" in text


def test_comparison_and_scaling(root):
    def document(gpus, **tps):
        degrees = {"ring": "ring_degree", "tp": "tp_size", "dp": "dp_size", "single": "pp_size"}
        rows = [
            compared(f"{name}{gpus}" if name != "single" else name, value, **{degrees[name]: gpus})
            | {"gpus": gpus, "tps_per_gpu": value / gpus}
            for name, value in tps.items()
        ]  # fmt: skip
        return {"rows": rows, "sweep": [*rows, *({**row, "length": 500} for row in rows)]}

    bars = [
        {"what": "against tp", "figure": "tps", "of": {"layout": "ring2", "length": 1000},
         "over": {"layout": "tp2", "length": 1000}, "at_least": 1.2},
        {"what": "shown", "figure": "comm_exposed_ms", "of": {"layout": "ring2"}, "over_figure": "step_ms",
         "at_most": 0.1},
    ]  # fmt: skip
    sections = [
        section("comparison", "two", bars=bars),
        section("scaling", "one", "two", "four", needs=2, rows={"length": [1000]}),
    ]
    text, summary = root(sections, one=document(1, single=500.0), two=document(2, ring=960.0, tp=800.0))
    assert "| ring2 | 960 | 4.167 |" in text
    assert "| against tp | 1.2 | ≥ 1.2 | met |" in text
    assert summary["met"] == ["against tp", "shown"]
    assert "| layout | 1 GPU | 2 GPUs |" in text
    assert "| single | 500 (1.000) | - |" in text
    assert "| ring | - | 480 (0.960) |" in text
    assert "- About scaling (`benchmarks/results/four.json`): `make four`" in text


def test_scaling_over_gpus_of_different_kinds_names_them(root):
    alone = compared("single", 500.0) | {"gpus": 1, "tps_per_gpu": 500.0, "device": "H100"}
    two = compared("ring2", 960.0, ring_degree=2) | {"gpus": 2, "tps_per_gpu": 480.0, "device": "H200"}
    text, _ = root(
        [section("scaling", "one", "two")], one={"rows": [alone], "sweep": []}, two={"rows": [two], "sweep": []}
    )
    assert "| layout | 1 GPU (H100) | 2 GPUs (H200) |" in text


def test_latency_and_the_longest_sequence(root):
    rows = latency.judge([timed("single", 10000, 2.0, gpus=1), timed("ring4", 10000, 0.6, ring_degree=4)])
    one = {"rows": rows, "unfit": [{"layout": "single", "length": 131072, "mode": "full"}]}
    longest = {
        "layout": "ring2", "gpus": 2, "dtype": "fp16", "granularity": 0.02, "shortest_not_fitting": 612345,
        "max_positions": 1 << 20, "rows": [],
        "longest": {"length": 601234, "seconds": 31.25, "tokens_per_second": 19239.5, "peak_memory_gib": [77.0, 76.5]},
    }  # fmt: skip
    whole = longest | {"layout": "ring4", "shortest_not_fitting": None}
    text, _ = root([section("latency", "one"), section("longest", "two", "four")], one=one, two=longest, four=whole)
    assert "| ring4 | 0.600 (0.30) | - |" in text
    assert "| single | 2.000 | does not fit |" in text
    assert "| ring2 | 2 | 601,234 | 612,345 | 31.2 | 19,240 | 77.0 / 76.5 |" in text
    assert "| ring4 | 2 | 601,234 | not reached: the model has 1,048,576 positions |" in text


def test_what_is_not_recorded_is_listed_with_its_command_and_no_table(root):
    wanted = [{"what": "tokens", "figure": "length", "of": {}, "at_least": 1e6}]
    nobody = section("comparison", "peers")
    nobody["sources"][0]["command"] = None
    text, summary = root([section("longest", "far", bars=wanted), nobody], other={"device": "a GPU", "rows": []})
    assert "- About longest (`benchmarks/results/far.json`): `make far`\n  Wanted: tokens ≥ 1,000,000." in text
    assert "`benchmarks/results/peers.json`): no command makes it yet" in text
    assert "## About" not in text
    assert "|" not in text
    assert "## Other records" in text
    assert summary["not_measured"] == ["far.json", "peers.json"]


def test_a_note_is_about_the_record_it_was_written_for(root):
    old = section("forward", "one")
    old["sources"][0]["notes"] = {"abc123": "From before."}
    assert "`one.json`: From before." in root([old], one={"rows": [forward_row()]})[0]
    assert "From before." not in root([old], one={"rows": [forward_row()], "git": "def456"})[0]


def test_the_worst_of_several_rows_counts():
    rows = [{"impl": "ours", "error": 1e-4}, {"impl": "ours", "error": 3e-4}, {"impl": "other", "error": 1.0}]
    most = Bar(what="", figure="error", of={"impl": "ours"}, at_most=2e-4)
    assert judge(most, rows).measured == 3e-4
    assert judge(most, rows).met is False
    assert judge(Bar(what="", figure="error", of={"impl": "ours"}, at_least=1e-5), rows).measured == 1e-4


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"introduction": "", "sections": [], "more": 1}', r"page\.json: more: Extra inputs are not permitted"),
        ('{"introduction": "", "sections": [{"title": "", "kind": "pie", "sources": []}]}', r"sections\.0\.kind"),
    ],
)
def test_an_unusable_manifest_is_refused(tmp_path, manifest, message):
    with pytest.raises(ConfigError, match="cannot read"):
        page.read(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / page.MANIFEST).write_text(manifest)
    with pytest.raises(ConfigError, match=message):
        page.read(tmp_path)


def test_a_bar_has_one_side_and_a_record_is_json(root, tmp_path):
    with pytest.raises(ValueError, match="either at_least or at_most"):
        Bar(what="", figure="x", of={})
    (tmp_path / page.RESULTS).mkdir(parents=True)
    (tmp_path / page.RESULTS / "one.json").write_text("half a fi")
    with pytest.raises(ConfigError, match=r"one\.json is not JSON"):
        root([section("forward", "one")])


class TestRecording:
    """Commands that write a file and nothing else."""

    @staticmethod
    def source(name, gpus=1, code="pass", output=None):
        text = f"import json; json.dump({PROVENANCE!r}, open({str(output or f'results/{name}.json')!r}, 'w'))"
        return {"file": f"{name}.json", "command": shlex.join(["python", "-c", f"# --num_gpus {gpus}\n{code}; {text}"])}

    @pytest.fixture
    def recorded(self, tmp_path):
        def run(sources, names=(), gpus=1, limit_s=60.0, preparations=()):
            sections = [{"title": "One", "kind": "attention", "sources": sources}]
            document = {"introduction": "", "preparations": list(preparations), "sections": sections}
            (tmp_path / page.RESULTS).mkdir(parents=True, exist_ok=True)
            (tmp_path / page.MANIFEST).write_text(json.dumps(document))
            said = []
            found = record.record(tmp_path, names, limit_s, gpus, said.append)
            return found, {file.stem for file in (tmp_path / page.RESULTS).glob("*.json")}, said

        return run

    def test_the_launcher_takes_gpus_that_are_visible(self, recorded, monkeypatch):
        started = []
        monkeypatch.setattr(record, "run", lambda words, ranks, **options: started.append((words, options["unset"])))
        monkeypatch.setattr("ds_ring.process.launcher.gpu_count", lambda: 2)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
        commands = ["deepspeed --quiet --num_gpus 2 launch/bench.py", "python launch/compare.py"]
        recorded([{"file": f"{n}.json", "command": command} for n, command in enumerate(commands)], gpus=2)
        assert started == [
            (["deepspeed", "--quiet", "--include", "localhost:2,3", "launch/bench.py"], ("CUDA_VISIBLE_DEVICES",)),
            ([sys.executable, "launch/compare.py"], ()),
        ]

    def test_what_is_missing_and_can_be_made_is(self, recorded):
        sources = [self.source("here"), self.source("two", gpus=2), self.source("fails", code="assert False")]
        sources += [self.source("elsewhere", output="results/other"), {"file": "never.json", "command": None}]
        found, files, said = recorded(sources)
        assert found["left_out"] == {
            "two.json": "needs 2 GPUs",
            "fails.json": "ended with exit code 1; see results/fails.log",
            "elsewhere.json": "gave no results/elsewhere.json",
        }
        assert files == {"here"} == {name.removesuffix(".json") for name in found["recorded"]}
        assert len(said) == 3
        assert recorded(sources[:1])[0] == {"recorded": {}, "left_out": {}}
        assert list(recorded(sources[:1], names=["here.json"])[0]["recorded"]) == ["here.json"]
        assert recorded(sources[1:2], gpus=2)[1] == {"here", "two"}

    def test_time_ends(self, recorded):
        slow = self.source("slow", code="import time; time.sleep(30)")
        found, files, _ = recorded([slow, self.source("behind")], limit_s=1.0)
        assert found["left_out"]["slow.json"] == "did not end in 1 s; see results/slow.log"
        assert found["left_out"]["behind.json"] == "no time left"
        assert files == set()

    def test_what_a_cut_command_had_is_kept_where_there_is_no_record(self, recorded, tmp_path):
        write = f"import json, time; json.dump({PROVENANCE!r} | {{'had': 1}}, open('results/cut.json', 'w'))"
        cut = self.source("cut", code=f"{write}; time.sleep(30)")
        reason, kept = "did not end in 2 s; see results/cut.log", tmp_path / page.RESULTS / "cut.json"
        assert recorded([cut], limit_s=2.0)[0]["left_out"] == {"cut.json": f"{reason}; what it had by then is kept"}
        assert json.loads(kept.read_text())["had"] == 1
        kept.write_text(json.dumps(PROVENANCE))
        assert recorded([cut], names=["cut.json"], limit_s=2.0)[0]["left_out"] == {"cut.json": reason}
        assert "had" not in json.loads(kept.read_text())

    def test_what_a_command_needs_is_made_before(self, recorded, tmp_path):
        makes = {
            "makes": "text",
            "command": "python -c \"open('text', 'w').write('1234567'[2 * 3 :])\"",
            "wanted_by": ["text"],
        }
        reads = self.source("reads", code="assert open('text').read() == '7'")
        assert recorded([reads], preparations=[makes])[1] == {"reads"}
        (tmp_path / "text").write_text("8")  # there already
        assert recorded([reads], names=["reads.json"], preparations=[makes])[0]["recorded"] == {}

    def test_names_that_cannot_be_made(self, recorded):
        with pytest.raises(ConfigError, match=r"has no record b\.json; it has a\.json"):
            recorded([self.source("a")], names=["b.json"])
        with pytest.raises(ConfigError, match=r"no command makes a\.json yet"):
            recorded([{"file": "a.json", "command": None}], names=["a.json"])

    def test_commands_of_the_page_write_where_records_are_looked_for(self):
        for source in (source for one in page.read(ROOT)[1] for source in one.section.sources if source.command):
            assert source.command.endswith(f"--output results/{source.file}")
        assert [record.gpus_of(c) for c in ("bench --num_gpus 4", "compare ds_configs/gpu2/*.json", "x")] == [4, 2, 1]
