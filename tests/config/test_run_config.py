"""Configurations that load, what overrides them, and where their checkpoint is."""

import json
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from accelerate import ParallelismConfig
from pydantic import ValidationError

from ds_ring.config import ParallelConfig, RunConfig, WorkloadConfig
from ds_ring.errors import ConfigError
from ds_ring.parallel.topology import Topology

DOCUMENT = {
    "dtype": "bf16",
    "tensor_parallel": {"tp_size": 2},
    "replace_with_kernel_inject": False,
    "ds_ring": {
        "model": "checkpoints/paper",
        "parallel": {"pp_size": 2, "ring_impl": "contiguous"},
        "workload": {"max_length": 10000},
        "benchmark": {"text": ["a.txt", "b.txt"], "sweep": [2048, 512]},
        "transport": "process_group",
    },
}


def refused(text: str) -> Any:
    """Expect a ConfigError of exactly this text."""
    return pytest.raises(ConfigError, match=f"^{re.escape(text)}$")


class TestLoading:
    def test_nothing_gives_the_defaults(self):
        config = RunConfig.load(None)
        assert config == RunConfig.load({}) == RunConfig()
        assert config.parallel == ParallelConfig()
        assert config.workload == WorkloadConfig()
        assert config.topology == Topology()
        assert (config.dtype, config.tp_size, config.ring.model, config.ring.transport) == ("fp32", 1, None, "auto")

    def test_documented_defaults(self):
        assert RunConfig.load(None).document() == {
            "dtype": "fp32",
            "ds_ring": {
                "model": None,
                "parallel": {
                    "auto": False, "dp_size": 1, "pp_size": 1, "ring_degree": 1, "ulysses_degree": 1,
                    "ring_impl": "zigzag", "ring_variant": "auto",
                    "decode": "auto", "gather_limit_mib": 2048,
                },
                "workload": {
                    "batch_size": 1, "max_length": 1024, "micro_batch_size": 1, "block_tokens": 65536,
                    "prefill_chunk": 0,
                },
                "benchmark": {
                    "implementation": "ds_ring", "sweep": [], "micro_batch_sizes": [], "text": [], "warmup": 1,
                    "warmup_batch_size": 0, "repeats": 3, "sustain_s": 0, "speed_only": False, "mode": "full",
                },
                "transport": "auto",
                "interleave": "auto",
                "in_flight": 2,
                "timeout_s": 1800,
                "start_timeout_s": 60,
                "decode_graph": "auto",
                "fusion": "auto",
            },
        }  # fmt: skip

    @pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
    def test_the_dtype_is_the_checkpoints_own_unless_said_otherwise(self, tmp_path, field):
        (tmp_path / "config.json").write_text(json.dumps({field: "bfloat16"}))
        model = {"model": str(tmp_path)}
        assert RunConfig.load({"ds_ring": model}).dtype == RunConfig.load(None, **model).dtype == "bf16"
        assert RunConfig.load({"dtype": "fp16", "ds_ring": model}).dtype == "fp16"
        assert RunConfig.load({"ds_ring": model}, dtype="fp32").dtype == "fp32"
        assert RunConfig.load(None, model=str(tmp_path / "config.json")).dtype == "bf16"
        (tmp_path / "config.json").write_text("{}")
        assert RunConfig.load(None, **model).dtype == "fp32"

    def test_a_dtype_that_was_not_given_is_left_open_for_whoever_loads_it_again(self, tmp_path):
        models = {}
        for dtype in ("bfloat16", "float16"):
            (tmp_path / dtype).mkdir()
            (tmp_path / dtype / "config.json").write_text(json.dumps({"dtype": dtype}))
            models[dtype] = {"model": str(tmp_path / dtype)}
        run = RunConfig.load({}, ring_degree=2)
        assert (run.dtype, RunConfig.load(run, **models["bfloat16"]).dtype) == ("fp32", "bf16")
        run = RunConfig.load(run, **models["bfloat16"])
        assert "dtype" not in run.deepspeed
        assert run.document()["dtype"] == run.facts()["dtype"] == "bf16"
        assert RunConfig.load(run, max_length=5).dtype == "bf16"
        assert RunConfig.load(run, **models["float16"]).dtype == "fp16"
        assert RunConfig.load(RunConfig.load(run, dtype="fp32"), **models["float16"]).dtype == "fp32"

    @pytest.mark.parametrize("as_path", [str, Path])
    def test_a_file_and_a_dict_of_its_content_are_the_same(self, tmp_path, as_path):
        file = tmp_path / "run.json"
        file.write_text(json.dumps(DOCUMENT))
        assert RunConfig.load(as_path(file)) == RunConfig.load(DOCUMENT)

    def test_sections_reach_their_places(self):
        config = RunConfig.load(DOCUMENT)
        assert config.topology == Topology(pp=2, tp=2)
        assert config.parallel.ring_impl == "contiguous"
        assert config.workload.max_length == 10000
        assert config.benchmark.text == ("a.txt", "b.txt")
        assert config.ring.model == "checkpoints/paper"
        assert config.ring.transport == "process_group"

    def test_lengths_are_the_sweep_and_the_longest_ascending_and_once_each(self):
        assert RunConfig.load(DOCUMENT).lengths == [512, 2048, 10000]
        assert RunConfig.load({}, max_length=8, sweep=(8, 16, 8)).lengths == [8, 16]
        assert RunConfig.load({}, max_length=8).lengths == [8]

    def test_deepspeeds_keys_are_handed_on_untouched(self):
        config = RunConfig.load(DOCUMENT)
        assert config.deepspeed == {key: value for key, value in DOCUMENT.items() if key != "ds_ring"}

    def test_loading_leaves_the_callers_dict_alone(self):
        before = json.loads(json.dumps(DOCUMENT))
        RunConfig.load(DOCUMENT, tp_size=4, ring_degree=2, max_length=5, dtype="fp32")
        assert before == DOCUMENT

    @pytest.mark.parametrize("source", [None, DOCUMENT])
    def test_document_loads_to_the_same_configuration(self, source):
        config = RunConfig.load(source)
        assert RunConfig.load(config.document()).document() == config.document()
        assert RunConfig.load(json.loads(json.dumps(config.document()))).ring == config.ring
        assert RunConfig.load(config).document() == config.document()

    def test_every_configuration_is_frozen(self):
        config = RunConfig.load(DOCUMENT)
        for section, field in ((config, "ring"), (config.parallel, "pp_size"), (config.workload, "max_length")):
            with pytest.raises(ValidationError, match="frozen"):
                setattr(section, field, 1)


class TestOverrides:
    @pytest.mark.parametrize(
        ("name", "value", "place"),
        [
            ("pp_size", 4, "parallel.pp_size"),
            ("ring_degree", 8, "parallel.ring_degree"),
            ("ring_impl", "zigzag", "parallel.ring_impl"),
            ("max_length", 7, "workload.max_length"),
            ("tp_size", 4, "tp_size"),
            ("dtype", "fp32", "dtype"),
            ("model", "elsewhere", "ring.model"),
            ("transport", "auto", "ring.transport"),
            ("timeout_s", 60, "ring.timeout_s"),
        ],
    )
    def test_an_override_replaces_the_files_value_and_nothing_else(self, name, value, place):
        where = attrgetter(place)
        config = RunConfig.load(DOCUMENT, **{name: value})
        assert where(config) == value
        assert where(RunConfig.load(DOCUMENT)) != value
        assert where(RunConfig.load(RunConfig.load(DOCUMENT), **{name: value})) == value
        others = [line for line in _lines(config) if line not in _lines(RunConfig.load(DOCUMENT))]
        assert len(others) == 1

    def test_none_means_as_in_the_file(self):
        assert RunConfig.load(DOCUMENT, pp_size=None, tp_size=None, dtype=None) == RunConfig.load(DOCUMENT)

    def test_tp_size_belongs_to_deepspeeds_part_and_keeps_its_neighbours(self):
        config = RunConfig.load({"tensor_parallel": {"enabled": True}}, tp_size=8)
        assert config.deepspeed == {"tensor_parallel": {"enabled": True, "tp_size": 8}}
        assert config.topology == Topology(tp=8)
        assert config.document()["tensor_parallel"]["tp_size"] == 8

    def test_an_unknown_override_is_refused(self):
        with refused("there is no option ring_size"):
            RunConfig.load(None, ring_size=2)

    def test_an_override_is_checked_like_the_files_values(self):
        with refused("ds_ring.parallel.ring_degree=0: Input should be greater than or equal to 1"):
            RunConfig.load(None, ring_degree=0)


def _lines(config: RunConfig) -> list[str]:
    return json.dumps(config.document(), indent=1).replace(",\n", "\n").splitlines()


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ("fp32", "fp32"), ("float32", "fp32"), ("float", "fp32"), ("torch.float32", "fp32"),
        ("fp16", "fp16"), ("half", "fp16"), ("float16", "fp16"), ("torch.float16", "fp16"),
        ("bf16", "bf16"), ("bfloat16", "bf16"), ("torch.bfloat16", "bf16"),
    ],
)  # fmt: skip
def test_deepspeeds_dtype_names(given, dtype):
    assert RunConfig.load({"dtype": given}).dtype == dtype


def test_accelerates_parallelism_config_gives_degrees():
    for sizes, degrees in (
        ({"cp_size": 4}, {"ring_degree": 4}),
        ({"sp_size": 2, "dp_replicate_size": 2}, {"ulysses_degree": 2, "dp_size": 2}),
        ({"tp_size": 2}, {"tp_size": 2}),
        ({}, {}),
    ):
        given = ParallelismConfig(**sizes)
        assert RunConfig.load({}, parallelism_config=given) == RunConfig.load({}, **degrees)
    with pytest.raises(ConfigError, match="dp_shard_size=2: weights are not sharded here"):
        RunConfig.load({}, parallelism_config=ParallelismConfig(dp_shard_size=2))


def test_a_degree_by_name_comes_before_accelerates():
    given = ParallelismConfig(cp_size=4)
    assert RunConfig.load({}, parallelism_config=given, ring_degree=2).parallel.ring_degree == 2
    assert RunConfig.load({}, parallelism_config=given, ring_degree=None).parallel.ring_degree == 4
