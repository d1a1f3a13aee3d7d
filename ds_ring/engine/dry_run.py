"""A model's forward without its weights: what cannot be sharded is found before any are read."""

# Shapes: B batch, T tokens, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial

import torch
from deepspeed.module_inject.auto_tp import AutoTP
from deepspeed.module_inject.fusedqkv_utils import prepare_tp_fused_qkvw
from deepspeed.module_inject.layers import LinearAllreduce, TensorParallel_Layer, fused_LinearLayer
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ds_ring.attention.spec import AttentionSpec
from ds_ring.config import RunConfig
from ds_ring.engine.deepspeed_backend import cannot_cut, refuse_misread
from ds_ring.errors import CheckpointError, UnsupportedModelError, UserError, in_one_line
from ds_ring.hf.attention import inject
from ds_ring.hf.attention_context import Attend, AttentionContext
from ds_ring.hf.build import build
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.dims import model_dims
from ds_ring.hf.rope import compute_on_host
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.transport.mesh import Mesh
from ds_ring.utils.model_config import file_of

LENGTH = 2


def dry_run(config: PretrainedConfig, run: RunConfig) -> None:
    """Run a few tokens through the model of ``config`` on the meta device, with the attention that is to be injected,
    and once more as AutoTP cuts it. Takes as long as building the layers, whatever their size.

    Raises:
        UnsupportedModelError: what the first forward would refuse or fail at, by name.
        CheckpointError: a config of which no model can be made, or one whose layers do not fit together.
    """
    with torch.device("meta"):
        model = build(config, torch.bfloat16)  # products of experts have no other on the meta device
    decoder, heads = Decoder.of(model), model_dims(config).num_heads
    # Its part in a tensor-parallel group is what the second pass is about.
    context = AttentionContext(Mesh(replace(run.topology, tp=1), 0, {}), run.parallel, heads, tile_tokens=0)
    inject(model, context)
    compute_on_host(model)
    stopped = _forward(decoder, context, _nothing)
    if stopped is not None and not _asks_for_numbers(stopped):
        raise CheckpointError(
            f"{file_of(config)}: {type(model).__name__} fails at its first forward with this config: "
            f"{in_one_line(stopped)}"
        )
    if run.tp_size == 1:
        return
    try:
        with redirect_stdout(sys.stderr):
            _cut(model, run.tp_size)
        found = _forward(decoder, context, partial(_with_heads, heads // run.tp_size))
    except UserError:
        raise
    except Exception as error:
        raise _uncut(model, error) from None
    if found is not None and str(found) != str(stopped):
        raise _uncut(model, found)


def _forward(decoder: Decoder, context: AttentionContext, attend: Attend) -> Exception | None:
    """What stopped it. A model may ask the device for numbers, such as which experts are met, and there are none: what
    comes behind is left to the engine's own forwards."""
    ids_BT = torch.zeros(1, LENGTH, dtype=torch.long, device="meta")
    try:
        with (
            torch.inference_mode(),
            context.forward(SequenceLayout(LENGTH), len(decoder.layers), type(decoder.model).__name__),
            context.attending_by(attend),
        ):
            decoder.model(input_ids=ids_BT, position_ids=ids_BT, use_cache=False)
    except UserError:
        raise
    except Exception as error:
        return error
    return None


def _asks_for_numbers(error: Exception) -> bool:
    """Whether ``error`` comes of the meta device alone."""
    return isinstance(error, NotImplementedError) or (isinstance(error, RuntimeError) and "meta" in str(error))


def _nothing(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
    return torch.empty_like(q_BTHD)


def _with_heads(
    heads: int, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, spec: AttentionSpec, sinks_H: Tensor | None
) -> Tensor:
    if q_BTHD.shape[2] != heads:
        raise ValueError(f"a rank attends with {q_BTHD.shape[2]} heads instead of {heads}")
    return torch.empty_like(q_BTHD)


def _cut(model: PreTrainedModel, tp: int) -> None:
    """Let AutoTP put in its layers, without a group, and make these take and leave what a rank's do."""
    for kind, names in AutoTP.tp_parser(model):
        for layer in [module for module in model.modules() if type(module) is kind]:
            cutter = AutoTP(layer, names, "", None, None, kind, model_config=model.config.get_text_config())
            cutter.set_tensor_parallel_config(tp, None)
            cutter.update_linear_policies()
            cutter._replace_module(layer)
    refuse_misread(model)
    for name, module in model.named_modules():
        if isinstance(module, TensorParallel_Layer):
            vars(module)["forward"] = partial(_share, name, module, tp)


def _share(name: str, module: TensorParallel_Layer, tp: int, x: Tensor) -> Tensor:
    """What a rank's part of a layer makes of ``x``, by shape."""
    outputs, inputs = module.weight.shape
    by_rows = isinstance(module, LinearAllreduce)
    taken = inputs // tp if by_rows else inputs
    if x.shape[-1] != taken:
        raise ValueError(f"{name} takes {taken} elements of a token and is given {x.shape[-1]}")
    if isinstance(module, fused_LinearLayer):
        outputs = prepare_tp_fused_qkvw(module.fused_module.module, module.weight, tp, 0, module.tp_meta).shape[0]
    elif not by_rows:
        outputs //= tp
    return x.new_empty((*x.shape[:-1], outputs))


def _uncut(model: PreTrainedModel, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(cannot_cut(model, " ".join(str(error).split())))
