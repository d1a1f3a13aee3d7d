"""Write a seeded safetensors checkpoint, with a byte-level tokenizer, of a transformers config.

python launch/make_checkpoint.py --config ds_configs/models/paper.json --directory checkpoints/paper
"""

from __future__ import annotations

import argparse

from ds_ring.cli import options


def work(args: argparse.Namespace) -> dict[str, object]:
    import torch

    from ds_ring.cli.seeded_checkpoint import make_checkpoint

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    parameters = make_checkpoint(args.config, args.directory, seed=args.seed, dtype=args.dtype, device=device)
    return {"directory": args.directory, "parameters": parameters, "dtype": args.dtype, "seed": args.seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a transformers config.json")
    parser.add_argument("--directory", required=True, help="where the checkpoint goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp16")
    parser.add_argument("--device", help="where weights are drawn [cuda where there is one]")
    parser.add_argument("--output", metavar="FILE.json", help="where to write the result line as well")
    options.main(work, parser)


if __name__ == "__main__":
    main()
