"""Measure one layout on one workload. See benchmarks/cli/bench.py."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from ds_ring.process.interruption import start

if __name__ == "__main__":
    start("benchmarks.cli.bench")
