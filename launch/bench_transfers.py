"""Time a layer's matrix products while GPUs copy from each other. See benchmarks/cli/bench_transfers.py."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from ds_ring.process.interruption import start

if __name__ == "__main__":
    start("benchmarks.cli.bench_transfers")
