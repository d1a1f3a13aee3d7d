"""Compare layouts on one model and text. See benchmarks/cli/compare.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cli.compare import main

if __name__ == "__main__":
    main()
