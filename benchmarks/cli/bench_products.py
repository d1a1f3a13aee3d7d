"""Time a layer's matrix products on one GPU: by every algorithm that cuBLASLt offers for them, or in panels of rows.

python launch/bench_products.py --model ds_configs/models/paper.json --rows 10000 20000 --output results/products.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_ring.cli import options
from ds_ring.config import DType
from ds_ring.errors import ConfigError


def work(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks.kernels import products
    from benchmarks.reports import tables
    from ds_ring.hf.attention import torch_dtype
    from ds_ring.hf.dims import model_dims, read_config
    from ds_ring.utils import hardware, results
    from ds_ring.utils.progress import make_console

    if min([1, *args.panels, *args.rows]) < 1 or args.finalists < 0:
        raise ConfigError(f"rows={args.rows}, panels={args.panels} or finalists={args.finalists} is too small")
    cases = products.cases(model_dims(read_config(args.model)))
    if not torch.cuda.is_available():
        raise ConfigError("no CUDA GPU; this benchmark needs one")
    device = torch.device("cuda")
    torch.manual_seed(0)
    dtype = torch_dtype(args.dtype)
    how = {"seconds": args.seconds, "say": options.say, "finalists": args.finalists, "panels": args.panels}
    rows = (row for m in args.rows for row in products.run(cases, m, dtype, device, **how))
    document = {**results.provenance(), "device": hardware.device_name(device), "dtype": args.dtype}
    document = results.collect(document, rows, args.output)
    make_console().print(tables.products_table(document["rows"]))
    return document


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory, or a file of ds_configs/models/")
    parser.add_argument("--rows", type=int, nargs="+", default=[10000], metavar="M", help="tokens at a time [10000]")
    text = "cuBLASLt's algorithms that are sustained, of those that are tried; 0: try none [3]"
    parser.add_argument("--finalists", type=int, default=3, metavar="N", help=text)
    text = "PyTorch's call as well for so many rows at a time, which the L2 cache may hold"
    parser.add_argument("--panels", type=int, nargs="+", default=[], metavar="M", help=text)
    parser.add_argument("--dtype", choices=[name for name in get_args(DType) if name != "fp32"], default="fp16")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each is sustained [2]")
    parser.add_argument("--output", metavar="FILE.json", help="where to write the result as well")
    options.main(work, parser)
