"""Run a command on several hosts that this machine plays. See benchmarks/cli/local_hosts.py."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from ds_ring.process.interruption import start

if __name__ == "__main__":
    start("benchmarks.cli.local_hosts")
