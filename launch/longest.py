"""Find the longest sequence that a layout can hold. See benchmarks/cli/longest.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cli.longest import main

if __name__ == "__main__":
    main()
