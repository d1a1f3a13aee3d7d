"""A run whose launcher was given a hostfile that does not exist, and went on without it."""

import pytest

from tests.helpers.launching import deepspeed

pytestmark = pytest.mark.launch

OF_A_USER = """
import ds_ring
from ds_ring.cli.options import leave
from ds_ring.errors import ConfigError
try:
    ds_ring.from_pretrained("nowhere")
except ConfigError as error:
    print(f"error: {error}", flush=True)
leave(2)
"""


@pytest.mark.parametrize("whose", ["ours", "a user's"])
def test_a_run_with_a_hostfile_that_is_not_there_is_refused(whose, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(OF_A_USER)
    what = ["launch/score.py", "--model", "nowhere"] if whose == "ours" else [str(script)]
    done = deepspeed(1, "--hostfile", "no/hosts", *what, expect=2)
    assert "error: --hostfile no/hosts is no file in" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
