"""Write needle and variable-tracking tasks for lm_eval. See ds_ring/cli/make_tasks.py."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from ds_ring.process.interruption import start

if __name__ == "__main__":
    start("ds_ring.cli.make_tasks")
