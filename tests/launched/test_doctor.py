"""The doctor as a script: one configuration that can run, one that cannot."""

import sys

import pytest

from ds_ring.process.launcher import reserved_port
from tests.helpers.launching import last_line, run
from tests.helpers.tiny_models import build, llama_gqa

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build(llama_gqa()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("ulysses_degree", "code"), [(3, 0), (2, 2)])
def test_the_script(ulysses_degree, code, checkpoint):
    command = [sys.executable, "launch/doctor.py", "--model", checkpoint, "--ulysses-degree", str(ulysses_degree)]
    with reserved_port() as port:
        done = run([*command, "--master-port", str(port)], expect=code)
    last = last_line(done)
    assert last["problems"] == (1 if code else 0)
    assert {check["what"] for check in last["checks"]} >= {"torch", "launcher", "port", "GPUs", "checkpoint"}
    if code:
        assert "error: 1 of" in done.stderr
        assert "problem  configuration: num_heads=9" in done.stderr
