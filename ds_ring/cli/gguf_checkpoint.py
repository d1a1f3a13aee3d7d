"""A GGUF file as a safetensors checkpoint, with its tokenizer: transformers reads GGUF, and dequantises it."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_ring.errors import CheckpointError, in_one_line
from ds_ring.hf.attention import torch_dtype
from ds_ring.hf.build import ATTENTION, build


def convert(file: str | Path, directory: str | Path, *, dtype: str) -> int:
    """Write the model of ``file`` to ``directory``. Returns its number of parameters.

    Raises:
        CheckpointError: what transformers finds wrong with the file, or that the package gguf is not installed.
    """
    folder, name = Path(file).parent, Path(file).name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
        read = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, local_files_only=True, attn_implementation=ATTENTION
        )
    except Exception as error:  # a file of another form, or an architecture that transformers does not convert
        raise CheckpointError(f"{file} cannot be read as GGUF: {in_one_line(error)}") from None
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # weights are plain numbers by now
    model = build(config, torch_dtype(dtype))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(directory, max_shard_size="2GB")
    tokenizer.save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())
