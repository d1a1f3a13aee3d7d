"""Check transformers' causal LMs, sharded against unsharded. See benchmarks/cli/check_models.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cli.check_models import main

if __name__ == "__main__":
    main()
