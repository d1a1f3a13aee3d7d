"""Whether a sharded engine computes what the unsharded model does: hidden states of every token, at full length.

The reference is transformers' own model with its own attention on one device. It is written to a file once
(``python -m benchmarks.layouts.parity``) and read by the launch of every layout.
"""

# Shapes: B sequences, L tokens, n tokens of several sequences, d hidden size or vocabulary.
from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ds_ring.cli import options
from ds_ring.engine import nan_check
from ds_ring.engine.batch import pack
from ds_ring.engine.connect import local_device
from ds_ring.engine.engine import Engine
from ds_ring.errors import ConfigError, NumericsError
from ds_ring.hf.attention import torch_dtype
from ds_ring.hf.decoder import Decoder
from ds_ring.utils.corpus import text_windows, token_stream
from ds_ring.utils.model_config import read_config

SDPA = "sdpa_heads_apart"
"""transformers' SDPA on contiguous tensors."""

ALL_LOGITS_LIMIT = 1 << 24
"""Logits of all tokens are compared where a sequence has at most this many; otherwise those of the last token."""

TOKENS_AT_A_TIME = 4096
"""Tokens of a long sequence that are compared at once, in fp64 on the host."""


@dataclass(frozen=True)
class Difference:
    """Relative errors |x - reference| / |reference| (Euclidean norms): of all tokens, and of the worst one."""

    rel_error: float
    max_rel_error: float


def load_reference(checkpoint: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The unsharded model, with transformers' own attention."""
    AttentionInterface.register(SDPA, _heads_apart)
    AttentionMaskInterface.register(SDPA, sdpa_mask)
    options = {
        "dtype": dtype, "device_map": {"": device}, "trust_remote_code": False, "local_files_only": True,
    }  # fmt: skip
    # Older transformers drop soft-capping under SDPA silently.
    capped = getattr(read_config(checkpoint).get_text_config(), "attn_logit_softcapping", None) is not None
    try:
        implementation = "eager" if capped else SDPA
        model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation=implementation, **options)
    except ValueError:  # a class without SDPA, for example one with attention sinks
        model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", **options)
    return model.eval()


def write_reference(model: PreTrainedModel, input_ids_BL: Tensor, path: str | Path) -> None:
    """Write the unsharded model's final hidden states [B, L, d] and logits, and their tokens, to ``path``.

    Raises:
        NumericsError: some are not finite, so that nothing can be compared with them.
    """
    every = input_ids_BL.shape[1] * model.config.get_text_config().vocab_size <= ALL_LOGITS_LIMIT
    hidden, logits = [], []
    with torch.inference_mode(), Decoder.of(model).captured_hidden() as found:
        for ids_L in input_ids_BL:
            out = model(input_ids=ids_L[None].to(model.device), use_cache=False, logits_to_keep=0 if every else 1)
            hidden.append(found.pop().cpu())
            logits.append(out.logits.cpu())
            if not nan_check.all_finite(hidden[-1], logits[-1]):
                raise NumericsError(f"the unsharded model gave NaN or infinity; {nan_check.CHECK}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({"input_ids": input_ids_BL, "hidden": torch.cat(hidden), "logits": torch.cat(logits)}, path)


def _heads_apart(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    """PyTorch's memory-efficient kernel counts elements in 32 bits (pytorch#187227). With values inside a fused
    projection of 24,576 columns, it reads outside them from token 87,382 on, and silently gives wrong results."""
    return sdpa_attention_forward(module, *(t.contiguous() for t in (query, key, value)), *args, **options)


def compare(engine: Engine, path: str | Path) -> Difference:
    """Run the reference's sequences through ``engine``. Collective; every rank gets the same result.

    Every rank compares what it holds: hidden states of its tokens, and logits where it has them.

    Raises:
        NumericsError: the engine gave NaN or infinity.
    """
    tally = _Tally()
    with safe_open(path, framework="pt") as file:
        batch, _ = pack(file.get_tensor("input_ids"), None, None, engine.runner.dims)
        every = file.get_slice("logits").get_shape()[1] == batch.length
        for shard in nan_check.checked(
            engine.runner,
            lambda: engine.prefill(batch, "all" if every else "last", want_hidden=True),
            nan_check.finite_shard,
        ):
            own, hidden = shard.batch.sequences, shard.hidden_BTd is not None
            if shard.hidden_BTd is not None:
                real = shard.positions_T < batch.length
                want = file.get_slice("hidden")[own.start : own.stop][:, shard.positions_T[real]]
                tally.add(shard.hidden_BTd[:, real], want)
            if shard.logits_BkV is not None and len(shard.kept_k):
                at = shard.kept_k if every else [0]
                want = file.get_slice("logits")[own.start : own.stop][:, at]
                tally.add(shard.logits_BkV, want, worst_only=hidden)
    return tally.of_all_ranks(engine)


def compare_last(engine: Engine, path: str | Path) -> Difference:
    """As ``compare``, for ``prefill_only``: the logits of each sequence's last token."""
    tally = _Tally()
    with safe_open(path, framework="pt") as file:
        batch, _ = pack(file.get_tensor("input_ids"), None, None, engine.runner.dims)
        logits, first = file.get_slice("logits"), engine.runner.sequences_of_replica(len(batch.sequences)).start
        last = logits.get_shape()[1] - 1
        for part_BV in nan_check.checked(engine.runner, lambda: engine.prefill_only(batch), nan_check.all_finite):
            if part_BV is not None:
                tally.add(part_BV, logits[first : first + len(part_BV)][:, last])
                first += len(part_BV)
    return tally.of_all_ranks(engine)


class _Tally:
    """Sums of squared errors, and the worst token, of one rank and then of all ranks."""

    def __init__(self) -> None:
        self._squares, self._worst = torch.zeros(2, dtype=torch.float64), 0.0

    def add(self, got: Tensor, want: Tensor, worst_only: bool = False) -> None:
        for got_nd, want_nd in zip(*(t.flatten(0, -2).split(TOKENS_AT_A_TIME) for t in (got, want)), strict=True):
            self._add(got_nd.cpu().double(), want_nd.double(), worst_only)

    def _add(self, got_nd: Tensor, want_nd: Tensor, worst_only: bool) -> None:
        difference, size = (got_nd - want_nd).square().sum(-1), want_nd.square().sum(-1)
        self._worst = max(self._worst, float((difference / size).max().sqrt()))
        if not worst_only:
            self._squares += torch.stack((difference.sum(), size.sum()))

    def of_all_ranks(self, engine: Engine) -> Difference:
        everyone = engine.gather((self._squares.tolist(), self._worst))
        totals = torch.tensor([pair for pair, _ in everyone]).sum(0)
        return Difference(float((totals[0] / totals[1]).sqrt()), max(w for _, w in everyone))


def main(args: argparse.Namespace) -> None:
    if len(args.length) != len(args.output):
        raise ConfigError(f"{len(args.length)} lengths and {len(args.output)} outputs; give each length a file")
    model = load_reference(args.model, torch_dtype(args.dtype), local_device())
    stream = token_stream(args.model, args.text)
    for length, output in zip(args.length, args.output, strict=True):
        options.say(f"reference: the unsharded model, L = {length}")
        write_reference(model, text_windows(stream, args.rows, length).contiguous(), output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--length", type=int, nargs="+", required=True, help="one or more, ascending")
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--output", nargs="+", required=True, help="a file for each length")
    options.main(main, parser)
