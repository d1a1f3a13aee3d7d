"""Kill processes of runs and see what is left. See benchmarks/cli/kill_trials.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cli.kill_trials import main

if __name__ == "__main__":
    main()
