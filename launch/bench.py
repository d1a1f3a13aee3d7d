"""Measure one layout on one workload. See benchmarks/cli/bench.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cli.bench import main

if __name__ == "__main__":
    main()
