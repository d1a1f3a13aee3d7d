"""Time one block of attention on one GPU: every implementation at hand beside a matrix product.

python launch/bench_attention.py --output benchmarks/results/attention.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_ring import cli
from ds_ring.errors import ConfigError


def work(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ds_ring import bench_attention, hardware, report, results
    from ds_ring.progress import make_console

    if not torch.cuda.is_available():
        raise ConfigError("no CUDA GPU; this benchmark needs one")
    device = torch.device("cuda")
    torch.manual_seed(0)
    rows = bench_attention.run(bench_attention.default_cases(), device, args.seconds, cli.say)
    make_console().print(report.attention_table(rows))
    return {**results.provenance(), "device": hardware.device_name(device), "rows": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long each case is timed [4]")
    parser.add_argument("--output", metavar="FILE.json", help="where to write the result as well")
    cli.main(work, parser)
