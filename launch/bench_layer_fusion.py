"""Time decoder layers: stock, fused and compiled. See benchmarks/cli/bench_layer_fusion.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cli.bench_layer_fusion import main

if __name__ == "__main__":
    main()
