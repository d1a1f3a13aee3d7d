"""Write a safetensors checkpoint: with seeded random weights of a transformers config, or of a GGUF file.

    python launch/make_checkpoint.py --config ds_configs/models/paper.json --directory checkpoints/paper
    python launch/make_checkpoint.py --gguf model.Q4_1.gguf --directory checkpoints/model

The first has a byte-level tokenizer. The second keeps its own and needs the package gguf.
"""

from __future__ import annotations

import argparse

from ds_ring.cli import options


def work(args: argparse.Namespace) -> dict[str, object]:
    import torch

    if args.gguf:
        from ds_ring.cli.gguf_checkpoint import convert

        parameters = convert(args.gguf, args.directory, dtype=args.dtype)
        return {"directory": args.directory, "parameters": parameters, "dtype": args.dtype, "gguf": args.gguf}
    from ds_ring.cli.seeded_checkpoint import make_checkpoint

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    parameters = make_checkpoint(args.config, args.directory, seed=args.seed, dtype=args.dtype, device=device)
    return {"directory": args.directory, "parameters": parameters, "dtype": args.dtype, "seed": args.seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="a transformers config.json")
    source.add_argument("--gguf", metavar="FILE", help="a GGUF file, quantised or not")
    parser.add_argument("--directory", required=True, help="where the checkpoint goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp16")
    parser.add_argument("--device", help="where weights are drawn [cuda where there is one]")
    parser.add_argument("--output", metavar="FILE.json", help="where to write the result line as well")
    options.main(work, parser)


if __name__ == "__main__":
    main()
