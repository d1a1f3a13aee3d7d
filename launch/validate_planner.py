"""Hold predictions against records. See benchmarks/cli/validate_planner.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cli.validate_planner import main

if __name__ == "__main__":
    main()
