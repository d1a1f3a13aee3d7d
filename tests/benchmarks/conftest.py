"""A comparison whose launches are mocked."""

from pathlib import Path

import pytest

from benchmarks.layouts import compare
from ds_ring.config import RunConfig
from ds_ring.utils import results


@pytest.fixture
def two_layouts(tmp_path, monkeypatch):
    """A comparison of ring4 and tp2_pp2 whose launcher does what ``outcomes`` says by layout, and its folder of logs.
    ``outcomes["launches"]`` lists what was launched together."""
    outcomes = {"launches": (launches := [])}

    def launch(script, ranks, options, *, log, report, timeout_s):
        files = [tuple(options[options.index(name) + 1] for name in ("--config", "--output"))]
        files += [(options[i + 1], options[i + 2]) for i, option in enumerate(options) if option == "--then"]
        names = [Path(output).stem for _, output in files]
        assert log.stem == names[0]
        launches.append(names)
        for name, (config, output) in zip(names, files, strict=True):
            assert RunConfig.load(config).label == name.partition(".")[0]
            for outcome in outcomes.get(name, []):
                if isinstance(outcome, BaseException):
                    raise outcome
                before = results.read_json(output)["rows"] if Path(output).exists() else []
                results.write_json(output, {"rows": [*before, outcome]})

    monkeypatch.setattr(compare.launcher, "launch", launch)
    monkeypatch.setattr(compare.launcher, "run_module", lambda *_, **__: None)
    files = [str(compare.launcher.ROOT / "ds_configs" / "cpu4" / f"{name}.json") for name in ("ring4", "tp2_pp2")]
    return compare.Comparison.make(files, {"sweep": (500,)}), outcomes, tmp_path / "logs"
