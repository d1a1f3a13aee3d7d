"""Generate text from prompts. See ds_ring/cli/generate.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_ring.cli.generate import main

if __name__ == "__main__":
    main()
