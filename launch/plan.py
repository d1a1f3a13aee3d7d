"""List the layouts that fit a model and a number of GPUs, fastest first. See ds_ring/cli/plan.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_ring.cli.plan import main

if __name__ == "__main__":
    main()
