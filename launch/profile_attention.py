"""Profile the attention kernel with Nsight Compute. See benchmarks/cli/profile_attention.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cli.profile_attention import main

if __name__ == "__main__":
    main()
