"""Write docs/performance.md and its pictures from the recorded results.

    python launch/performance.py

What it shows is in benchmarks/page.json: results files by section, what was wanted of them, and the commands for those
that do not exist yet. The last line of standard output tells what was met, missed and not measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ds_ring import cli


def work(args: argparse.Namespace) -> dict[str, Any]:
    from ds_ring.performance import page

    return page.write(ROOT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(output=None)
    cli.main(work, parser)
