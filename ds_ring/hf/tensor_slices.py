"""Tensor parallelism over whole weights: inside ``sliced`` every linear layer of a decoder reads a slice, a view.

This is for steps of decoding, which read all weights for few tokens. With sequence parallelism every rank holds the
whole model; with slices each rank reads only its part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from ds_ring.errors import ConfigError, UnsupportedModelError
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.dims import model_dims
from ds_ring.hf.tp_plan import pattern, style_of, tp_plan
from ds_ring.parallel.degrees import suggest, valid_degrees
from ds_ring.transport.base import Transport

_MARK = "_ds_ring_in_slices"
Held = Callable[[str], Tensor | None]
"""Gives the part that this rank holds of a parameter, by its name in the decoder; None where it holds all of it."""


@dataclass(frozen=True)
class Slice:
    """A rank's part of a linear layer; a call is the layer's forward.

    Attributes:
        weight: a view of the layer's weight [out, in]: some of its outputs (column-parallel) or of its inputs
            (row-parallel).
        bias: a view of those outputs' bias; the whole bias of a row-parallel layer, which is added once to the sum.
        reduce: sums the ranks' results of a row-parallel layer; None for a column-parallel layer, where each rank keeps
            its own outputs.
    """

    weight: Tensor
    bias: Tensor | None
    reduce: Transport | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.reduce is None:
            return linear(x, self.weight, self.bias)
        total = self.reduce.all_reduce(linear(x, self.weight))
        return total if self.bias is None else total + self.bias


@contextmanager
def sliced(model: PreTrainedModel, tp_rank: int, tp_size: int, transport: Transport) -> Iterator[dict[str, Slice]]:
    """Inside the block, forwards of ``model`` are those of rank ``tp_rank`` in a tensor-parallel group.

    All ranks of the group call the model together, on the same tokens, and get the same logits. The attention runs on
    the rank's H / tp_size query and K / tp_size key/value heads, those from ``tp_rank * K / tp_size`` on, and so does
    its cache. No weights are copied, and after the block the layers run as before.

    Args:
        transport: among the ``tp_size`` ranks, in any order.

    Yields:
        the slice of each linear layer, by the layer's name in the decoder.

    Raises:
        ConfigError: heads or widths that ``tp_size`` does not divide.
        UnsupportedModelError: the model's config does not say how a parameter is cut, or slices cannot be cut so.
    """
    slices = slices_of(model, tp_rank, tp_size, transport)
    with in_slices(Decoder.of(model), slices):
        yield slices


@contextmanager
def in_slices(decoder: Decoder, slices: dict[str, Slice]) -> Iterator[None]:
    """``sliced`` with slices that were made before: made once, they serve every step."""
    attributes = [vars(decoder.module.get_submodule(name)) for name in slices]
    assert not any("forward" in own for own in attributes), "the model is sliced already, or its layers are wrapped"
    # Set on the instances, they hide the class's method: hooks, names and parameters stay as they are.
    for own, forward in zip(attributes, slices.values(), strict=True):
        own["forward"] = forward
    for layer in decoder.layers:
        vars(layer)[_MARK] = True
    try:
        yield
    finally:
        for own in attributes:
            del own["forward"]
        for layer in decoder.layers:
            del vars(layer)[_MARK]


def is_sliced(layer: nn.Module) -> bool:
    """Whether a decoder layer is inside such a block, in which forwards made for its whole weights must not be used."""
    return _MARK in vars(layer)


def slices_of(
    model: PreTrainedModel, tp_rank: int, tp_size: int, transport: Transport, held: Held = lambda name: None
) -> dict[str, Slice]:
    """The slices by their layers' names in the decoder. How a layer is cut is in the config's ``base_model_tp_plan``.

    Args:
        held: where ranks hold the weights between them, cut by the same plan.

    Raises:
        ConfigError, UnsupportedModelError: as for ``sliced``.
    """
    assert 0 <= tp_rank < tp_size == transport.size
    _check_heads(model, tp_size)
    name_of_model, plan = type(model).__name__, tp_plan(model)
    if not plan:
        raise UnsupportedModelError(
            f"{name_of_model}: transformers' config has no tensor-parallel plan for it, so its weights cannot be sliced"
        )
    decoder = Decoder.of(model)
    slices = {}
    for name, parameter in decoder.module.named_parameters():
        if not name.startswith(f"{decoder.layers_name}."):
            continue
        owner, _, _ = name.rpartition(".")
        module = decoder.module.get_submodule(owner)
        style = style_of(plan, name)
        if style in ("colwise", "rowwise") and type(module) is nn.Linear:
            slices[owner] = _cut(
                module, style, f"{name_of_model}: {owner}", tp_rank, tp_size, transport, held(f"{owner}.weight")
            )
        elif not _same_on_every_rank(model, parameter, style):
            how = f"as {style}" if style else "nowhere"
            raise UnsupportedModelError(
                f"{name_of_model}: the tensor-parallel plan has {pattern(name)}, of a {type(module).__name__}, {how}; "
                f"slices serve linear layers that are colwise or rowwise, and norms"
            )
    return slices


def _cut(
    module: nn.Linear, style: str, name: str, rank: int, size: int, transport: Transport, held: Tensor | None
) -> Slice:
    dim, what = (0, "outputs") if style == "colwise" else (1, "inputs")
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    width = weight.shape[dim]
    if width % size:
        raise ConfigError(
            f"{name} has {width} {what}, not divisible by tp_size={size}; " + suggest(valid_degrees(width), "use 1")
        )
    share = width // size
    part = weight.narrow(dim, rank * share, share) if held is None else held
    if style == "rowwise":
        return Slice(part, bias, transport)
    return Slice(part, None if bias is None else bias.narrow(0, rank * share, share), None)


def _check_heads(model: PreTrainedModel, tp_size: int) -> None:
    dims = model_dims(model.config)
    for name in ("num_heads", "num_kv_heads"):
        count = getattr(dims, name)
        if count % tp_size:
            fitting = valid_degrees(dims.num_heads, dims.num_kv_heads)
            raise ConfigError(f"{name}={count} is not divisible by tp_size={tp_size}; " + suggest(fitting, "use 1"))


def _same_on_every_rank(model: PreTrainedModel, parameter: Tensor, style: str | None) -> bool:
    """Whether a parameter serves any part of the heads as it is: the weight of a norm over a token or over a head."""
    dims = model_dims(model.config)
    replicated = style is None or style.startswith("replicated")
    return replicated and parameter.shape in ((dims.hidden_size,), (dims.head_dim,))
