"""Run a command on several hosts that this machine plays. See benchmarks/cli/local_hosts.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cli.local_hosts import main

if __name__ == "__main__":
    main()
