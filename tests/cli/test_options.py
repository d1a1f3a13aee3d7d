"""What every command does with its result, and with its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ds_ring.cli import options
from ds_ring.config import BenchmarkConfig, RunConfig
from ds_ring.errors import ConfigError, is_out_of_memory
from ds_ring.process.launcher import ROOT
from ds_ring.process.outcome import NO_OUTPUT
from tests.helpers.limits import HANG_S

PLAN = [
    sys.executable, "launch/plan.py", "--model", "ds_configs/models/paper.json", "--ranks", "2", "--card", "H100",
]  # fmt: skip


def plan(*options: object, shell: str = "") -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f'{shell} exec "$@"', "bash", *PLAN, *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (Path("/proc/none/plan.json"), "No such file or directory"),
        (ROOT, "Is a directory"),
        (ROOT / "README.md/plan.json", "File exists"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(output, reason):
    done = plan("--output", output)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: --output {output} cannot be written: {reason}")


def test_a_result_that_does_not_fit_the_disk_is_printed_all_the_same(tmp_path):
    output = tmp_path / "new" / "plan.json"
    assert plan("--output", output).returncode == 0
    before = output.read_text()
    done = plan("--output", output, shell="ulimit -f 1;")
    assert done.returncode == NO_OUTPUT == 4
    assert json.loads(done.stdout.splitlines()[-1])["rows"]
    assert done.stderr.splitlines()[-1] == f"failed on rank 0: {output} could not be written: File too large"
    assert output.read_text() == before
    assert [file.name for file in output.parent.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


class TestSet:
    """``--set NAME=VALUE``: any field of the engine's."""

    @staticmethod
    def parsed(*words: str) -> RunConfig:
        return options.run_config(options.run_parser(None, options.USUAL).parse_args(list(words)))

    def test_values_are_json_or_text(self):
        config = self.parsed(
            "--set", "ring_variant=pass_kv", "in_flight=4", "--set", "block_tokens=0", "--ring-degree", "2"
        )
        assert (config.parallel.ring_variant, config.ring.in_flight, config.workload.block_tokens) == ("pass_kv", 4, 0)
        assert config.parallel.ring_degree == 2

    @pytest.mark.parametrize("words", ["in_flight", "repeats=3", "no_such=1", "=1"])
    def test_what_is_no_field_of_the_engines_is_refused(self, words):
        with pytest.raises(ConfigError, match=f"--set {words} is not NAME=VALUE with a name of auto, batch_size"):
            self.parsed("--set", words)

    def test_help_shows_a_default_where_there_is_one(self):
        text = " ".join(options.run_parser(None).format_help().split())
        assert "[None]" not in text
        assert "0: never [1800]" in text
        assert "where to write the result as well; folders that are missing are made" in text

    def test_a_user_of_a_model_is_shown_no_field_of_the_benchmarks(self):
        shown = {action.dest for action in options.run_parser(None, options.USUAL)._actions}
        assert not shown & set(BenchmarkConfig.model_fields)
        assert len(shown) == 21  # --help and the launcher's --local_rank among them
