"""Write docs/performance.md from the recorded results. See benchmarks/cli/performance.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cli.performance import main

if __name__ == "__main__":
    main()
