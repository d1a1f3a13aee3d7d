"""Write a safetensors checkpoint: with seeded random weights of a transformers config, or of a GGUF file.

    python launch/make_checkpoint.py --config ds_configs/models/paper.json --directory checkpoints/paper
    python launch/make_checkpoint.py --gguf model.Q4_1.gguf --directory checkpoints/model

The first has a byte-level tokenizer. The second keeps its own and needs the package gguf. The directory appears when it
is complete; it must not be there before, or be empty.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path

from ds_ring.cli import options
from ds_ring.cli.parser import LARGEST_SEED, Parser, whole
from ds_ring.errors import ConfigError, OutputError


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for a directory that cannot be made, or a file that is not there."""
    directory, source = Path(args.directory), Path(args.config or args.gguf)
    if not os.path.isfile(source):
        raise ConfigError(f"cannot read {source}: {'it is a folder' if os.path.isdir(source) else 'no such file'}")
    if args.device is not None and not re.fullmatch(r"cpu|cuda(:\d{1,3})?", args.device):
        raise ConfigError(f"--device {args.device} is none of cpu, cuda, cuda:N")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.exists() and not directory.is_dir():
            raise ConfigError(f"--directory {directory} is a file; name another")
        if directory.exists() and any(directory.iterdir()):
            raise ConfigError(f"--directory {directory} is not empty; remove it, or name another")
        with tempfile.TemporaryFile(dir=directory.parent):
            pass
    except OSError as error:
        raise ConfigError(f"--directory {directory} cannot be made: {error.strerror}") from None


def work(args: argparse.Namespace) -> dict[str, object]:
    import torch

    from ds_ring.process.keeper import scratch_folder

    directory = Path(args.directory)
    made: dict[str, object] = {"directory": args.directory, "dtype": args.dtype}
    try:
        with scratch_folder(directory.parent) as scratch:
            unfinished = scratch / "checkpoint"
            if args.gguf:
                from ds_ring.cli.gguf_checkpoint import convert

                made |= {"parameters": convert(args.gguf, unfinished, dtype=args.dtype), "gguf": args.gguf}
            else:
                from ds_ring.cli.seeded_checkpoint import make_checkpoint

                if (args.device or "").startswith("cuda") and not torch.cuda.is_available():
                    raise ConfigError(f"--device {args.device}: PyTorch sees no GPU")
                device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
                parameters = make_checkpoint(args.config, unfinished, seed=args.seed, dtype=args.dtype, device=device)
                made |= {"parameters": parameters, "seed": args.seed}
            unfinished.rename(directory)
    except OSError as error:
        raise OutputError(f"--directory {directory} could not be written: {error.strerror or error}") from None
    return made


def make_parser() -> Parser:
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="a transformers config.json")
    source.add_argument("--gguf", metavar="FILE", help="a GGUF file, quantised or not")
    parser.add_argument("--directory", required=True, help="where the checkpoint goes")
    parser.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0)
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp16")
    parser.add_argument("--device", help="where weights are drawn [cuda where there is one]")
    parser.add_argument("--output", metavar="FILE.json", help="where to write the result line as well")
    return parser


def main() -> None:
    options.main(work, make_parser(), check)


if __name__ == "__main__":
    main()
