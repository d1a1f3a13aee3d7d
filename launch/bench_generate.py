"""Time generation over several passes. See benchmarks/cli/bench_generate.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cli.bench_generate import main

if __name__ == "__main__":
    main()
