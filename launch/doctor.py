"""Check this machine, and a configuration, for what would stop a run. See ds_ring/cli/doctor.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_ring.cli.doctor import main

if __name__ == "__main__":
    main()
