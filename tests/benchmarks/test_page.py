"""The performance page: made from what is recorded, from nothing else, and not stale."""

import shlex
from functools import partial

import pytest

from benchmarks.layouts import compare, latency
from benchmarks.reports import page
from ds_ring.cli import options
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError
from ds_ring.process.launcher import ROOT
from tests.helpers.pages import make_page, section
from tests.helpers.recorded_rows import forward_row


@pytest.fixture
def made(tmp_path):
    return partial(make_page, tmp_path)


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
            files, overrides = [str(file) for file in sorted(ROOT.glob(args.layouts))], options.overrides(args)
            if args.latency:
                assert latency.comparison(files, args.latency, overrides).runs
            else:
                assert compare.Comparison.make(files, overrides).runs
        else:
            run = RunConfig.load(ROOT / args.config if args.config else None, **options.overrides(args))
            if "--num_gpus" in words:
                assert int(words[words.index("--num_gpus") + 1]) == run.topology.world_size


def test_a_section_names_its_record_and_what_made_it(made):
    rows = [forward_row(sm_clock_mhz=1300, power_w=700.4), forward_row(mode="prefill_only", gpus=2)]
    text, summary = made([section("forward", "one")], one={"rows": rows})
    (line,) = (line for line in text.splitlines() if "benchmarks/results/one.json" in line)
    for fact in ("made.py --by hand", "a GPU (1 and 2 of a host)", "1300 MHz", "700 W", "commit abc123", "2001-02-03"):
        assert fact in line
    assert summary == {
        "page": "docs/performance.md", "sections": ["About forward"], "met": [], "missed": [], "not_measured": []
    }  # fmt: skip


def test_what_is_not_recorded_is_listed_with_its_command_and_no_table(made):
    wanted = [{"what": "tokens", "figure": "length", "of": {}, "at_least": 1e6}]
    nobody = section("comparison", "nobody")
    nobody["sources"][0]["command"] = None
    text, summary = made([section("longest", "far", targets=wanted), nobody], other={"device": "a GPU", "rows": []})
    assert "- About longest (`benchmarks/results/far.json`): `make far`\n  Wanted: tokens ≥ 1,000,000." in text
    assert "`benchmarks/results/nobody.json`): no command makes it yet" in text
    assert "## About" not in text
    assert "|" not in text
    assert "## Other records" in text
    assert summary["not_measured"] == ["far.json", "nobody.json"]


def test_a_note_is_about_the_record_it_was_written_for(made):
    old = section("forward", "one")
    old["sources"][0]["notes"] = {"abc123": "From before."}
    assert "`one.json`: From before." in made([old], one={"rows": [forward_row()]})[0]
    assert "From before." not in made([old], one={"rows": [forward_row()], "git": "def456"})[0]


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


def test_a_record_that_is_no_json_is_refused(made, tmp_path):
    (tmp_path / page.RESULTS).mkdir(parents=True)
    (tmp_path / page.RESULTS / "one.json").write_text("half a fi")
    with pytest.raises(ConfigError, match=r"one\.json is not JSON"):
        made([section("forward", "one")])
