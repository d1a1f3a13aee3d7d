"""What every engine offers: the forward of a causal LM over many ranks, in transformers' terms.

Every rank is handed the same tokens and, from ``__call__``, gets the same full result. ``prefill`` is the layer below:
it leaves results where they were made, which is what a benchmark times.
"""

# Shapes: B rows, C columns of the caller's tensors, L packed tokens, T of them on this rank, k kept ones, V vocabulary.
from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutput

from ds_ring.config import RunConfig
from ds_ring.engine import nan_check, scoring
from ds_ring.engine.batch import Batch, pack
from ds_ring.engine.call_arguments import as_ids, as_mask, as_positions, as_targets
from ds_ring.engine.gather import gather_replicas
from ds_ring.engine.generation import generate
from ds_ring.engine.model_runner import NO_POSITIONS, CachedRunner, ModelRunner, Shard
from ds_ring.engine.oom import explain_oom
from ds_ring.engine.score_targets import check_wanted, targets_of
from ds_ring.engine.token_scores import TokenScores
from ds_ring.engine.vocabulary_scan import Wanted
from ds_ring.errors import InputError
from ds_ring.planning.validation import note_positions
from ds_ring.process.watchdog import Watchdog, watched
from ds_ring.transport.mesh import Mesh
from ds_ring.utils.device import synchronize
from ds_ring.utils.numbers import whole_number

T = TypeVar("T")


class Engine:
    """A causal LM over all ranks of its mesh.

    Attributes:
        runner: the layout: how this rank's part of the model runs. What only a layout knows is asked of it.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model, or this rank's part of it."""
        return self.runner.model

    @property
    def config(self) -> PretrainedConfig:
        """The model's config, as transformers' models have it."""
        return self.runner.model.config

    @property
    def run_config(self) -> RunConfig:
        """How this run is laid out."""
        return self.runner.run_config

    @property
    def mesh(self) -> Mesh:
        return self.runner.mesh

    @property
    def device(self) -> torch.device:
        return self.runner.device

    @property
    def watchdog(self) -> Watchdog:
        return self.runner.watchdog

    def settle(self) -> None:
        """Wait until everything queued on this rank's device has run."""
        with self.watchdog.watch("waiting for the device"):
            synchronize(self.device)

    @watched
    def meet(self) -> None:
        """Wait until all ranks are here."""
        self.mesh["world"].barrier()

    @watched
    def gather(self, value: T) -> list[T]:
        """Every rank's small Python value, in rank order."""
        return self.mesh["world"].all_gather_objects(value)

    def prepare(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, logits_to_keep: int = 0
    ) -> tuple[Batch, Tensor]:
        """Check and pack the caller's tensors; all ranks must have been given the same."""
        try:
            whole_number("logits_to_keep", logits_to_keep, least=0)
            ids_BC, mask_BC, positions_BC = as_ids(input_ids), as_mask(attention_mask), as_positions(position_ids)
            batch, columns_BL = pack(ids_BC.cpu(), mask_BC, positions_BC, self.runner.dims)
        except InputError as error:
            # Where only some ranks refuse, the others must hear of it rather than wait for them.
            self.mesh["world"].agree(input_ids=f"unusable ones: {error}")
            raise
        self.mesh["world"].agree(input_ids=batch.digest(), logits_to_keep=logits_to_keep)
        note_positions(int(batch.position_ids_BL.max()) + 1, self.runner.dims)
        return batch, columns_BL

    def _refuse_unserved(self, options: dict[str, Any]) -> None:
        """Raise InputError on every rank where an option would change what the model computes."""
        unserved = [name for name, value in options.items() if not _changes_nothing(name, value)]
        if unserved:
            raise InputError(
                f"the engine does not take {', '.join(unserved)}; it takes input_ids, attention_mask, position_ids and "
                f"logits_to_keep"
            )

    def _cached_runner(self, wanted: str) -> CachedRunner:
        if not isinstance(self.runner, CachedRunner):
            raise InputError(
                f"implementation={self.run_config.benchmark.implementation} has no {wanted}, only whole forwards; take "
                f"implementation=ds_ring"
            )
        return self.runner

    @watched
    @explain_oom
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> CausalLMOutput:
        """The model's logits, on every rank: ``engine(**tokenizer(texts, padding=True, return_tensors="pt"))``.

        Args:
            input_ids: [B, C], the same on every rank.
            attention_mask: [B, C], 1 for tokens and 0 for padding, on either side.
            position_ids: [B, C]; None: every row counts its own tokens from 0.
            logits_to_keep: only this many last columns; 0 for all.
            options: what tokenizers and scripts for transformers pass besides, where it changes nothing here:
                ``token_type_ids`` of zeros, ``use_cache=False``, ``return_dict=True``.

        Returns:
            CausalLMOutput with logits [B, C or logits_to_keep, V] in the model's dtype; 0 at padding.

        Raises:
            InputError: unusable tensors (see ``pack``), or an option that is not served, by name.
            DisagreementError: ranks were given different tokens. NumericsError: a layer gave NaN or infinity.
        """
        self._refuse_unserved(options)
        batch, columns_BL = self.prepare(input_ids, attention_mask, position_ids, logits_to_keep)
        first = 0 if logits_to_keep == 0 else max(0, input_ids.shape[1] - logits_to_keep)
        micro_batches, mine = self.runner.micro_batches(batch)
        wanted_BL = columns_BL >= first
        keep = [torch.nonzero(wanted_BL[_sequences(m), : m.length].any(0))[:, 0] for m in micro_batches]
        shards = nan_check.checked_run(self.runner, micro_batches, keep, want_hidden=False)
        logits_BCV: Tensor | None = None
        for shard, kept_k, micro_batch in zip(shards, keep, micro_batches, strict=True):
            part_BkV = self.runner.assemble(shard.logits_BkV, micro_batch, kept_k, (self.runner.dims.vocab_size,))
            if logits_BCV is None:
                logits_BCV = part_BkV.new_zeros(len(mine), input_ids.shape[1] - first, self.runner.dims.vocab_size)
            columns_Bk = columns_BL[_sequences(micro_batch)][:, kept_k].to(self.device)
            sequence, k = torch.nonzero(columns_Bk >= first, as_tuple=True)
            own_sequence = sequence + (micro_batch.sequences.start - mine.start)
            logits_BCV[own_sequence, columns_Bk[sequence, k] - first] = part_BkV[sequence, k]
        assert logits_BCV is not None
        return CausalLMOutput(logits=gather_replicas(logits_BCV, len(batch.sequences), self.mesh["dp"]))

    @watched
    @explain_oom
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        past_key_values: Cache | None = None,
        streamer: BaseStreamer | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """transformers' own ``generate``, greedy or sampling, with the cache spread over the ranks.

        Every rank calls it with the same arguments and gets the same result. Sampling draws from rank 0's generator.

        Args:
            input_ids: [B, C], rows padded on the left; with ``past_key_values`` the whole conversation, as in
                transformers, or its new part under a mask of the whole.
            attention_mask: 1 for tokens and 0 for padding.
            inputs: transformers' other name for ``input_ids``.
            past_key_values: what an earlier call of this engine gave with ``return_dict_in_generate=True``.
            streamer: is told the tokens on rank 0.
            progress: is told on rank 0, after each chunk of the prompts, how many of its replica's tokens its layers
                have run, and of how many.
            options: transformers' arguments of ``generate``.

        Raises:
            InputError: unusable tokens or options, before any work. DisagreementError: ranks were given different ones.
            NumericsError: a layer gave NaN or infinity.
        """
        if "token_type_ids" in options and _changes_nothing("token_type_ids", options["token_type_ids"]):
            del options["token_type_ids"]  # tokenizers of some models give zeros, which mean nothing to a causal LM
        return generate(
            self._cached_runner("generate"),
            input_ids,
            inputs,
            attention_mask,
            generation_config,
            past_key_values,
            streamer,
            progress,
            options,
        )

    @watched
    @explain_oom
    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        target_ids: Tensor | None = None,
        start: int = 0,
        top_k: int = 0,
        entropy: bool = False,
        temperature: float = 1.0,
        hidden_states: bool = False,
    ) -> TokenScores:
        """Exact log-probabilities of given tokens, at any length: logits exist for a few tokens at a time.

        Args:
            input_ids: [B, C], the same on every rank.
            attention_mask: [B, C], 1 for tokens and 0 for padding, on either side. A sequence may be empty.
            target_ids: [B, C] or [B, C, A]: what is scored by the logits *at* each token, without a shift; -100 is
                skipped, and at padding anything may stand. None: of each token the next one.
            start: tokens of each sequence, padding not counted, whose targets are skipped.
            top_k: how many of the likeliest tokens to give at each scored token.
            entropy: give the entropy at each scored token.
            temperature: divides the logits before all else.
            hidden_states: give the final hidden state of each scored token.

        Returns:
            On every rank the same, ragged and on the host, in nats: see ``TokenScores``.

        Raises:
            InputError: unusable tensors or options, before any work. DisagreementError: ranks were given different
            ones. NumericsError: a layer, or the head, gave NaN or infinity.
        """
        wanted, world = Wanted(top_k, entropy, temperature), self.mesh["world"]
        try:
            check_wanted(wanted, start, self.runner.dims)
            given = as_ids(input_ids).cpu(), as_mask(attention_mask), as_targets(target_ids)
            targets = targets_of(*given, start, self.mesh.topology.dp, self.runner.dims)
        except InputError as error:
            world.agree(input_ids=f"unusable ones: {error}")
            raise
        world.agree(input_ids=targets.digest(), options=f"{wanted}, hidden_states={hidden_states}")
        if targets.batch is not None:
            note_positions(targets.batch.length, self.runner.dims)
        return scoring.score(self.runner, targets, wanted, hidden_states)

    @watched
    @explain_oom
    def prefill(self, batch: Batch, logits: Literal["none", "last", "all"], want_hidden: bool = False) -> list[Shard]:
        """One forward of this replica's rows; results stay where they are made.

        ``logits``: for no token, for each row's last, or for all.
        """
        micro_batches, _ = self.runner.micro_batches(batch)
        keep = {
            "none": [NO_POSITIONS for _ in micro_batches],
            "last": [torch.tensor(sorted({n - 1 for n in m.lengths})) for m in micro_batches],
            "all": [torch.arange(m.length) for m in micro_batches],
        }
        return self.runner.run_micro_batches(micro_batches, keep[logits], want_hidden)

    @watched
    @explain_oom
    def prefill_only(self, batch: Batch) -> list[Tensor | None]:
        """One forward of this replica's rows for the keys and values of all tokens and the logits that follow each row.

        The last layer makes keys and values for all tokens, and everything else for each row's last token only.
        Results, [B, V] a micro-batch, stay where they are made: on all ranks that share a sequence, and on the last
        pipeline stage.
        """
        runner = self._cached_runner("prefill_only")
        micro_batches, _ = runner.micro_batches(batch)
        return runner.run_for_last_tokens(micro_batches)

    @watched
    @explain_oom
    def next_token_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits [B, V] of the token after each row, on every rank, by ``prefill_only``.

        Arguments and errors as ``__call__``.
        """
        runner = self._cached_runner("prefill_only")
        batch, _ = self.prepare(input_ids, attention_mask, position_ids)
        micro_batches, mine = runner.micro_batches(batch)
        parts = nan_check.checked(
            runner, lambda: runner.run_for_last_tokens(micro_batches), lambda part: nan_check.all_finite(part)
        )
        whole_BV: Tensor | None = None
        if parts[0] is not None:
            whole_BV = torch.cat([part for part in parts if part is not None])
        else:
            dtype = next(p.dtype for p in self.model.parameters())
            whole_BV = torch.zeros(len(mine), self.runner.dims.vocab_size, dtype=dtype, device=self.device)
        stages = self.mesh["pp"]
        if stages.size > 1:
            whole_BV = stages.all_gather(whole_BV)[-1]
        return gather_replicas(whole_BV, len(batch.sequences), self.mesh["dp"])


def _changes_nothing(name: str, value: Any) -> bool:
    """Whether the option is one that transformers' causal LMs take, with the value that the engine uses anyway."""
    if name == "token_type_ids":
        return value is None or (isinstance(value, Tensor) and not bool(value.any()))
    usual = {"use_cache": (None, False), "return_dict": (None, True), "labels": (None,), "past_key_values": (None,)}
    return any(value is one for one in usual.get(name, ()))


def _sequences(batch: Batch) -> slice:
    return slice(batch.sequences.start, batch.sequences.stop)
