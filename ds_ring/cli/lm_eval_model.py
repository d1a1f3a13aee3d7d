"""An engine as a model of the lm_eval package, ``ds_ring`` by name.

Tokens, windows, chat templates and stop words are those of lm_eval's own back-end for transformers, which it derives
from; log-likelihoods come from ``Engine.score``, so no [L, V] logits exist, and texts from ``Engine.generate``. To
lm_eval a launch is one process: every rank makes the same calls in the same order, and ``Engine`` refuses others.
"""

# Shapes: B sequences, C columns, A continuations of a sequence.
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PretrainedConfig

from ds_ring.engine.engine import Engine
from ds_ring.errors import InputError
from ds_ring.utils.corpus import load_tokenizer
from ds_ring.utils.model_config import read_config
from ds_ring.utils.unscored import UNSCORED

log = logging.getLogger("ds_ring")

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""(texts, token ids of the context, of the continuation); no texts for a window of a longer one."""
Answer = tuple[float, bool]
"""(log-likelihood of the continuation in nats, whether each of its tokens is the likeliest)"""


class LoadedOnFirstUse:
    """What lm_eval takes for the model. Weights load with the first request: after all that tasks may be refused for.

    Attributes:
        device: where requests are made; the engine moves them.
    """

    def __init__(self, config: PretrainedConfig, load: Callable[[], Engine]) -> None:
        self.config, self.device = config, torch.device("cpu")
        self._load = load

    @cached_property
    def engine(self) -> Engine:
        return self._load()

    def generate(self, **options: Any) -> Any:
        return self.engine.generate(**options)


@dataclass
class Scored:
    """A text whose last tokens are continuations: requests that differ in their last token, or in where they begin.

    Attributes:
        ids: what the model is given, the last token of the continuations left out.
        continuations: token ids of each, with the requests that ask for it.
    """

    ids: tuple[int, ...]
    continuations: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def targets(self, width: int) -> Tensor:
        """[len(ids), width], a column for each continuation; -100 where it has no token, and in columns left over."""
        targets_CA = torch.full((len(self.ids), width), UNSCORED)
        for column, tokens in enumerate(self.continuations):
            targets_CA[-len(tokens) :, column] = torch.tensor(tokens)
        return targets_CA


def scored(requests: Sequence[Request], max_length: int) -> list[Scored]:
    """Each text once, the longest first; of a request only its last ``max_length`` + 1 tokens, as in lm_eval.

    Raises:
        InputError: a continuation without tokens, or of more than ``max_length``.
    """
    found, cut = dict[tuple[int, ...], Scored](), 0
    for number, (_, context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= max_length:
            raise InputError(
                f"request {number} of the tasks has {len(context)} tokens of context and {len(continuation)} of "
                f"continuation; it needs at least one of each, and at most max_length={max_length} of the latter"
            )
        tokens = [*context, *continuation][-(max_length + 1) :]
        cut += len(context) + len(continuation) > len(tokens)
        text = found.setdefault(ids := tuple(tokens[:-1]), Scored(ids))
        text.continuations.setdefault(tuple(continuation), []).append(number)
    if cut:
        log.warning("%d of %d requests are cut on the left to max_length=%d tokens", cut, len(requests), max_length)
    return sorted(found.values(), key=lambda text: (-len(text.ids), text.ids))


def answers(engine: Engine, batch: Sequence[Scored]) -> Iterator[tuple[int, Answer]]:
    """(number of a request, its answer) for all requests of ``batch``, in one forward. Collective."""
    width = max(len(text.continuations) for text in batch)
    ids = [torch.tensor(text.ids) for text in batch]
    ids_BC = pad_sequence(ids, batch_first=True)
    mask_BC = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    targets_BCA = pad_sequence([text.targets(width) for text in batch], batch_first=True, padding_value=UNSCORED)
    scores = engine.score(ids_BC, mask_BC, target_ids=targets_BCA)
    for text, log_probs, is_argmax in zip(batch, scores.log_probs, scores.is_argmax, strict=True):
        for column, (tokens, numbers) in enumerate(text.continuations.items()):
            last = slice(-len(tokens), None)  # of the scored tokens, which are the last ones of the text
            answer = float(log_probs[last, column].double().sum()), bool(is_argmax[last, column].all())
            yield from ((number, answer) for number in numbers)


@register_model("ds_ring")
class RingLM(HFLM):
    """A model of lm_eval's whose forwards an engine runs.

    Attributes:
        load: makes the engine.
        shows_progress: whether this rank shows how many requests are answered.
    """

    load: ClassVar[Callable[[], Engine]]
    shows_progress: ClassVar[bool] = True

    def __init__(self, pretrained: str | LoadedOnFirstUse, batch_size: int = 1, **options: Any) -> None:
        """As ``HFLM``, whose ``options`` are of tokens and templates.

        Args:
            pretrained: the checkpoint that ``load`` loads.
            batch_size: sequences of one call, over all replicas.
        """
        if isinstance(pretrained, str):
            load_tokenizer(pretrained)
            options.setdefault("tokenizer", pretrained)
            pretrained = LoadedOnFirstUse(read_config(pretrained), type(self).load)
        options = {name: value for name, value in options.items() if name not in ("device", "max_batch_size")}
        super().__init__(pretrained, batch_size=batch_size, **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        engine, texts = self._model.engine, scored(requests, self.max_length)
        size = override_bs or self.batch_size
        found = dict[int, Answer]()
        hidden = disable_tqdm or not self.shows_progress
        with tqdm(total=len(requests), disable=hidden, desc="Running loglikelihood requests") as bar:
            for start in range(0, len(texts), size):
                for number, answer in answers(engine, texts[start : start + size]):
                    found[number] = answer
                    if (asked := requests[number][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", asked, answer)
                    bar.update()
        return [found[number] for number in range(len(requests))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            new = normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks)["max_gen_toks"]
            if new >= self.max_length:
                raise InputError(
                    f"task {request.task_name} asks for max_gen_toks={new}, which leaves a prompt no token of "
                    f"max_length={self.max_length}; give lm_eval's --gen_kwargs max_gen_toks=N, or a longer max_length"
                )
        return super().generate_until(requests, disable_tqdm=disable_tqdm or not self.shows_progress)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """[B, columns] of prompts and what follows them. Each replica has a row: the last one again where they are
        too few."""
        rows, replicas = len(context), self._model.engine.mesh.topology.dp
        places = torch.arange(max(rows, replicas)).clamp(max=rows - 1)
        options["attention_mask"] = options["attention_mask"][places]
        found: Tensor = super()._model_generate(context[places], max_length, stop, **options)
        return found[:rows]

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval's results say of the model."""
        run = self._model.engine.run_config
        return {"model_dtype": run.dtype, "layout": run.label}
