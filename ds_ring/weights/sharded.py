"""The weights of one model, held by several ranks between them; the model computes what it would with all of them.

For good, the parameters of layer i are views of the buffer that layer i is whole in (``staging.py``): whatever reads
``module.weight`` while the layer runs finds the whole weight there, and nothing else has to change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_ring.errors import CheckpointError
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.layer_loading import KEPT
from ds_ring.hf.tp_plan import tp_plan
from ds_ring.transport.base import Transport
from ds_ring.transport.peer_memory import Device
from ds_ring.weights.fetch import Parts, PulledParts, SentParts
from ds_ring.weights.layer_layout import LayerLayout, layer_layout, owners, shared_parameters
from ds_ring.weights.staging import Staging
from ds_ring.weights.vocabulary import SharedEmbedding, SharedHead, Table

log = logging.getLogger("ds_ring")


class ShardedWeights:
    """Takes ``model`` apart, layer by layer. Collective.

    Args:
        transport: of the ranks that hold one copy between them.
        device: where the model runs.
        peers: memory that these can read; None: parts travel as messages.
        on_host: parts are in the host's memory.
        fill: gives a layer its weights on the device, where the model's layers are on the meta device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        transport: Transport,
        device: torch.device,
        peers: Device | None = None,
        on_host: bool = False,
        fill: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.decoder, self.transport = Decoder.of(model), transport
        self.layouts = layouts_of(self.decoder, transport.size)
        self.parts: Parts = (
            SentParts(self.layouts, transport, device, on_host)
            if peers is None or on_host
            else PulledParts(self.layouts, transport, peers)
        )
        self.staging = Staging(self.parts, device)
        # Where a checkpoint cannot be read on one rank, all fail.
        with transport.together():
            for number, layer in enumerate(self.decoder.layers):
                fill(number)
                self._take_over(number, layer)
        self.staging.hook(self.decoder.layers)
        self.head: SharedHead | None = None
        self._tables: list[Table] = []
        self._share_vocabulary(model)
        transport.barrier()  # peers may read from here on

    @property
    def nbytes(self) -> int:
        """What this rank holds of them: its parts, the buffers, and what is whole on every rank."""
        inside = {id(parameter) for parameter in self._shared()}
        whole = sum(p.nbytes for p in self.decoder.model.parameters() if id(p) not in inside)
        return self.parts.memory.nbytes + self.staging.nbytes + whole

    def own(self, name: str) -> Tensor | None:
        """This rank's part of a parameter of the decoder, by its name there; None where it is whole."""
        prefix = f"{self.decoder.layers_name}."
        if not name.startswith(prefix):
            return None
        number, _, of_layer = name.removeprefix(prefix).partition(".")
        entries = {entry.name: entry for entry in self.layouts[int(number)].entries}
        return self.parts.own(int(number), entries[of_layer]) if of_layer in entries else None

    @contextmanager
    def passes(self, count: int, lanes: int = 1, wants_logits: bool = True) -> Iterator[None]:
        """Inside the block ``count`` micro-batches run through the model, ``lanes`` at a time."""
        if self.head is not None:
            self.head.unused = not wants_logits
        try:
            with self.staging.passes(count, lanes):
                yield
        finally:
            if self.head is not None:
                self.head.unused = False

    @contextmanager
    def same_tokens(self, sliced: bool) -> Iterator[None]:
        """Inside the block all ranks run the same tokens, on their parts (``sliced``) or on whole layers."""
        with ExitStack() as stack:
            if not sliced:
                stack.enter_context(self.passes(1))
            if self.head is not None:
                self.head.same_tokens = True
                stack.callback(setattr, self.head, "same_tokens", False)
            yield

    @contextmanager
    def whole_head(self) -> Iterator[None]:
        """Inside the block the head may be called as often as a rank likes. Collective."""
        with ExitStack() as stack:
            if self.head is not None:
                stack.enter_context(self.head.whole())
            yield

    def _take_over(self, number: int, layer: nn.Module) -> None:
        """Keep this rank's part of a layer; what is whole is a buffer's from here on."""
        memory = self.staging.memory_of(number)
        for entry, owner, attribute in owners(layer, self.layouts[number]):
            whole = getattr(owner, attribute).detach()
            if whole.dtype != entry.dtype:
                raise CheckpointError(f"{entry.name} of layer {number} is {whole.dtype}, not {entry.dtype}")
            self.parts.own(number, entry).copy_(entry.cut.part(whole, self.transport.rank))
            owner._parameters[attribute] = nn.Parameter(entry.whole(memory), requires_grad=False)
        for parameter in layer.parameters():
            setattr(parameter, KEPT, True)

    def _shared(self) -> Iterator[nn.Parameter]:
        for number, layer in enumerate(self.decoder.layers):
            for _, owner, attribute in owners(layer, self.layouts[number]):
                yield getattr(owner, attribute)

    def _share_vocabulary(self, model: PreTrainedModel) -> None:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tables: dict[int, Table] = {}
        for module in (embedding, head):
            if not isinstance(module, nn.Embedding) and type(module) is not nn.Linear:
                if module is not None:
                    log.info("%s is whole on every rank", type(module).__name__)
                continue
            weight = module.weight
            table = tables.get(id(weight))
            if table is None:
                table = tables[id(weight)] = Table(weight, self.transport)
                weight.data = table.own_Rd
            if isinstance(module, nn.Embedding):
                vars(module)["forward"] = SharedEmbedding(module, table)
            else:
                self.head = SharedHead(module, table)
                vars(module)["forward"] = self.head


def layouts_of(decoder: Decoder, size: int) -> list[LayerLayout]:
    """How ``size`` ranks hold the layers between them."""
    plan, kept = tp_plan(decoder.model), shared_parameters(list(decoder.layers), decoder.model)
    return [
        layer_layout(f"{decoder.layers_name}.{number}", layer, plan, size, kept)
        for number, layer in enumerate(decoder.layers)
    ]
