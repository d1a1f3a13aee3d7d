"""Write a checkpoint with random weights. See ds_ring/cli/make_checkpoint.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_ring.cli.make_checkpoint import main

if __name__ == "__main__":
    main()
