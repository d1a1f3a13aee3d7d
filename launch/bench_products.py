"""Time a layer's matrix products. See benchmarks/cli/bench_products.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cli.bench_products import main

if __name__ == "__main__":
    main()
