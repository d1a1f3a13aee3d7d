"""Configurations that are refused, in words that name the key and a way out."""

import re
from typing import Any

import pytest

from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError


def refused(text: str) -> Any:
    """Expect a ConfigError of exactly this text."""
    return pytest.raises(ConfigError, match=f"^{re.escape(text)}$")


class TestRefusedFiles:
    def test_missing(self, tmp_path):
        with refused(f"cannot read the configuration {tmp_path}/no.json: No such file or directory"):
            RunConfig.load(tmp_path / "no.json")

    def test_a_directory(self, tmp_path):
        with refused(f"cannot read the configuration {tmp_path}: Is a directory"):
            RunConfig.load(tmp_path)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b'{"dtype": }', "is not JSON: Expecting value at line 1, column 11"),
            (b"{\n  'dtype': 1}", "is not JSON: Expecting property name enclosed in double quotes at line 2, column 3"),
            (b"", "is not JSON: Expecting value at line 1, column 1"),
            (b"\xff\xfe", "is not JSON: it is not UTF-8 text"),
            (b"[]", "must hold a JSON object, not a list"),
        ],
    )
    def test_not_a_json_object(self, tmp_path, content, reason):
        file = tmp_path / "run.json"
        file.write_bytes(content)
        with refused(f"{file} {reason}"):
            RunConfig.load(file)

    def test_the_file_is_named_beside_a_wrong_key(self, tmp_path):
        file = tmp_path / "run.json"
        file.write_text('{"ds_ring": {"parallel": {"tp_size": 2}}}')
        with refused(
            f"ds_ring.parallel.tp_size is not a known key in {file}; known here: auto, decode, dp_size, "
            "gather_limit_mib, pp_size, ring_degree, ring_impl, ring_variant, ulysses_degree"
        ):
            RunConfig.load(file)


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"ds_ring": {"paralel": {}}},
         "ds_ring.paralel is not a known key; known here: benchmark, decode_graph, fusion, in_flight, interleave, "
         "model, parallel, start_timeout_s, timeout_s, transport, workload"),
        ({"ds_ring": {"workload": {"length": 5}}},
         "ds_ring.workload.length is not a known key; known here: batch_size, block_tokens, max_length, "
         "micro_batch_size, prefill_chunk"),
        ({"ds_ring": {"parallel": {"pp_size": "many"}}},
         "ds_ring.parallel.pp_size='many': Input should be a valid integer, unable to parse string as an integer"),
        ({"ds_ring": {"parallel": {"pp_size": 1.5}}},
         "ds_ring.parallel.pp_size=1.5: Input should be a valid integer, got a number with a fractional part"),
        ({"ds_ring": {"parallel": {"pp_size": None}}},
         "ds_ring.parallel.pp_size=None: Input should be a valid integer"),
        ({"ds_ring": {"parallel": 3}},
         "ds_ring.parallel=3: Input should be a valid dictionary or instance of ParallelConfig"),
        ({"ds_ring": {"benchmark": {"text": 3}}}, "ds_ring.benchmark.text=3: Input should be a valid tuple"),
        ({"ds_ring": {"parallel": {"ulysses_degree": 0}}},
         "ds_ring.parallel.ulysses_degree=0: Input should be greater than or equal to 1"),
        ({"ds_ring": {"benchmark": {"warmup": -1}}},
         "ds_ring.benchmark.warmup=-1: Input should be greater than or equal to 0"),
        ({"ds_ring": {"workload": {"max_length": 0}}},
         "ds_ring.workload.max_length=0: Input should be greater than or equal to 1"),
        ({"ds_ring": {"parallel": {"ring_impl": "striped"}}},
         "ds_ring.parallel.ring_impl='striped': Input should be 'zigzag' or 'contiguous'"),
        ({"ds_ring": {"parallel": {"ring_variant": "pass_v"}}},
         "ds_ring.parallel.ring_variant='pass_v': Input should be 'auto', 'pass_kv', 'gather_kv', 'local_first' "
         "or 'pass_q'"),
        ({"ds_ring": {"transport": "mpi"}},
         "ds_ring.transport='mpi': Input should be 'auto', 'process_group' or 'copy_engine'"),
        ({"ds_ring": {"benchmark": {"repeats": 0}, "modle": "x"}},
         "ds_ring.benchmark.repeats=0: Input should be greater than or equal to 1; "
         "ds_ring.modle is not a known key; known here: benchmark, decode_graph, fusion, in_flight, interleave, "
         "model, parallel, start_timeout_s, timeout_s, transport, workload"),
        ({"ds_ring": 3}, "ds_ring must be a JSON object, not 3"),
        ({"ds_ring": None}, "ds_ring must be a JSON object, not None"),
        ({"tensor_parallel": 2}, "tensor_parallel must be a JSON object, not 2"),
        ({"tensor_parallel": {"tp_size": 0}}, "tensor_parallel.tp_size=0 must be a whole number of at least 1"),
        ({"tensor_parallel": {"tp_size": "2"}}, "tensor_parallel.tp_size='2' must be a whole number of at least 1"),
        ({"tensor_parallel": {"tp_size": True}}, "tensor_parallel.tp_size=True must be a whole number of at least 1"),
        ({"dtype": "int8"}, 'dtype="int8" is not supported; take one of fp32, fp16, bf16, auto'),
    ],
)  # fmt: skip
def test_refused_documents(document, text):
    with refused(text):
        RunConfig.load(document)


@pytest.mark.parametrize(
    ("document", "override", "text"),
    [
        ({"ds_ring": {"parallel": 3}}, {"pp_size": 2}, "ds_ring.parallel must be a JSON object, not 3"),
        ({"ds_ring": {"benchmark": []}}, {"repeats": 2}, "ds_ring.benchmark must be a JSON object, not []"),
        ({"tensor_parallel": 2}, {"tp_size": 2}, "tensor_parallel must be a JSON object, not 2"),
    ],
)
def test_an_override_does_not_hide_a_section_of_the_wrong_type(document, override, text):
    with refused(text):
        RunConfig.load(document, **override)


def test_a_misspelt_option_names_the_one_that_was_meant():
    with refused("there is no option ring_degre; did you mean ring_degree?"):
        RunConfig.load({}, ring_degre=2)
