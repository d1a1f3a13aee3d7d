"""A checkpoint with random weights and a byte-level tokenizer: something to load where no model hub can be reached."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ds_ring.errors import ConfigError
from ds_ring.hf.attention import torch_dtype
from ds_ring.hf.build import build
from ds_ring.utils.model_config import read_config

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 256 + 1
"""The bytes, and the end of text, which is also the padding."""


def make_checkpoint(config_file: str | Path, directory: str | Path, *, seed: int, dtype: str, device: str) -> int:
    """Initialise the model as transformers does and save it as safetensors. Returns its number of parameters.

    The same seed gives the same weights on the same kind of device.

    Raises:
        CheckpointError: a config that cannot be read, or of which no model can be made.
        ConfigError: a vocabulary smaller than ``VOCABULARY``.
    """
    config = read_config(config_file)
    vocab_size = config.get_text_config().vocab_size
    if vocab_size < VOCABULARY:
        raise ConfigError(f"vocab_size={vocab_size} is too small for bytes; it must be at least {VOCABULARY}")
    torch.manual_seed(seed)
    with torch.device(device):
        model = build(config, torch_dtype(dtype))
    model.save_pretrained(directory, max_shard_size="2GB")
    byte_tokenizer().save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token a byte: it needs no training, knows every text, and its tokens count bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
