"""Time decoder layers: stock, fused and compiled. See benchmarks/cli/bench_layer_fusion.py."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from ds_ring.process.interruption import start

if __name__ == "__main__":
    start("benchmarks.cli.bench_layer_fusion")
