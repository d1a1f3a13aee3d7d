"""What is said as a process ends, where nobody is left to hear it."""

import os
import subprocess
import sys

import pytest

from tests.helpers.launching import ROOT

ENDINGS = {
    "heartbeat": "from ds_ring.process.heartbeat import _end_process; _end_process(1)('rank 0 ended')",
    "watchdog": """
import os
os.environ["WORLD_SIZE"] = "2"
from ds_ring.process.watchdog import NoActivity, Watchdog
import time
with Watchdog(NoActivity(), 0.1).watch("waiting"):
    time.sleep(60)
""",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_rank_ends_also_where_its_standard_error_is_broken(ending):
    """As when the ssh that started it is gone: a message that cannot be written would be all that is left undone."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([sys.executable, "-c", ENDINGS[ending]], stderr=write, cwd=ROOT, timeout=50)
    finally:
        os.close(write)
    assert done.returncode == 1
