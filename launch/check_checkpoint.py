"""A trained checkpoint beside transformers. See benchmarks/cli/check_checkpoint.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cli.check_checkpoint import main

if __name__ == "__main__":
    main()
