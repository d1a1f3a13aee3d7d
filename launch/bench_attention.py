"""Time one block of attention by every implementation. See benchmarks/cli/bench_attention.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cli.bench_attention import main

if __name__ == "__main__":
    main()
