"""Time a layer's matrix products while GPUs copy from each other. See benchmarks/cli/bench_transfers.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cli.bench_transfers import main

if __name__ == "__main__":
    main()
