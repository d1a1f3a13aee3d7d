"""Ranks that are threads, on one core."""

import os


def share_a_core() -> None:
    """Keep the calling thread on one core, which is that of all ranks of this process.

    Only one thread at a time holds Python's lock. Handing it over to another core takes as long as most operations of a
    test: worlds of threads that may move between two cores need twice the time. Each worker of pytest-xdist has a core
    of its own, as far as there are enough.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    cores = sorted(os.sched_getaffinity(os.getpid()))
    os.sched_setaffinity(0, {cores[(int(worker) if worker else os.getpid()) % len(cores)]})
