"""What a rank can find out about the processes above it."""

import os

from ds_ring.process.processes import parent_of


def test_parent_of_a_process():
    assert parent_of(os.getpid()) == os.getppid()
    assert parent_of(2**22 + 1) is None
