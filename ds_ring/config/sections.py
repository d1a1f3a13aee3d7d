"""The fields of a run, each with its default and description; the command line and the docs are derived from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ds_ring.parallel.layout import RingImpl

RingVariant = Literal["auto", "pass_kv", "gather_kv", "local_first", "pass_q"]
TransportName = Literal["auto", "process_group", "copy_engine"]
DType = Literal["fp32", "fp16", "bf16"]
FusionChoice = Literal["auto", "none"]
Mode = Literal["full", "prefill_only"]
Implementation = Literal["ds_ring", "deepspeed_ulysses", "context_parallel", "yunchang"]

BASELINE_DEGREES: dict[Implementation, tuple[str, ...]] = {
    "deepspeed_ulysses": ("ulysses_degree",),
    "context_parallel": ("ring_degree",),
    "yunchang": ("ulysses_degree", "ring_degree"),
}
"""Over which ranks another implementation shares a sequence."""


MOST = 1 << 40
"""More than any whole number here can mean; far beyond it arithmetic of PyTorch would overflow."""
LEAST_TEMPERATURE = 1e-30
"""Of sampling, but for 0. Logits are divided by it in fp32, whose range they leave below."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if annotation in (int, tuple[int, ...]) and any(isinstance(each, bool) for each in _each(value)):
            raise ValueError("true and false are no numbers")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _in_bounds(cls, value: Any) -> Any:
        if any(type(each) is int and each > MOST for each in _each(value)):
            raise ValueError(f"at most {MOST}")
        if isinstance(value, tuple) and any(type(each) is int and each < 1 for each in value):
            raise ValueError("each must be at least 1")
        return value


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


class ParallelConfig(Section):
    """How the ranks are used. ``tp_size`` is DeepSpeed's: ``"tensor_parallel": {"tp_size": N}``."""

    auto: bool = Field(
        False,
        description="choose all degrees by batch, length and memory (`ds-ring plan` shows them); also as "
        '"parallel": "auto"',
    )
    dp_size: int = Field(1, ge=1, description="replicas, each with its own rows of the batch")
    pp_size: int = Field(1, ge=1, description="pipeline stages (layers)")
    ring_degree: int = Field(1, ge=1, description="ranks that share a sequence by ring attention")
    ulysses_degree: int = Field(1, ge=1, description="ranks that share a sequence by heads-to-sequence all-to-all")
    ring_impl: RingImpl = Field("zigzag", description="which tokens a ring rank holds")
    ring_variant: RingVariant = Field(
        "auto",
        description="pass_kv: K/V are sent block by block; gather_kv: all visible K/V first; local_first: the own "
        "block while others' K/V arrive; pass_q: queries are sent to cached K/V",
    )
    decode: Literal["auto", "whole", "sliced"] = Field(
        "auto",
        description="whole: ranks that share a sequence all compute each new token; sliced: each reads its share of "
        "the layers' weights, as tensor parallel; auto: sliced where the model allows it and that saves more than its "
        "collectives cost",
    )
    gather_limit_mib: int = Field(
        2048,
        ge=0,
        description="auto takes gather_kv or local_first while the gathered K/V of one layer stay below this",
    )


class WorkloadConfig(Section):
    """What is run: of benchmarks exactly this, for the planner what to expect, and what fits into memory at a time."""

    batch_size: int = Field(1, ge=1, description="sequences of one pass, over all replicas")
    max_length: int = Field(1024, ge=1, description="tokens a sequence; score takes no longer documents")
    micro_batch_size: int = Field(1, ge=1, description="sequences a replica runs at a time")
    block_tokens: int = Field(
        65536,
        ge=0,
        description="tokens, over all sequences of a micro-batch, that a fused layer's MLP and projections run at a "
        "time where a rank has more; 0: all at once",
    )
    prefill_chunk: int = Field(
        0, ge=0, description="prompt tokens of each sequence that generate runs at a time; 0: the whole prompt at once"
    )


class BenchmarkConfig(Section):
    """How benchmarks measure: read by `launch/bench.py`, `launch/compare.py` and the like alone."""

    implementation: Implementation = Field(
        "ds_ring",
        description="whose code shares a sequence; for comparison DeepSpeed's UlyssesSPAttentionHF (over "
        "ulysses_degree), PyTorch's context_parallel (over ring_degree) or yunchang (over either or both) in "
        "transformers' own layers",
    )
    micro_batch_sizes: tuple[int, ...] = Field(
        (), description="sizes of micro-batches that benchmarks try instead, each a row; the fastest counts"
    )
    sweep: tuple[int, ...] = Field((), description="other lengths that benchmarks run as well")
    text: tuple[str, ...] = Field((), description="text files; none: the language reference that ships with Python")
    warmup: int = Field(1, ge=0, description="untimed passes before the timed ones")
    warmup_batch_size: int = Field(
        0,
        ge=0,
        description="sequences of the untimed passes, in which bytes are counted too; 0: 16 micro-batches a replica, "
        "or the whole batch where that is less",
    )
    repeats: int = Field(3, ge=1, description="timed passes, at least")
    sustain_s: int = Field(
        0, ge=0, description="seconds that timed passes go on for: a GPU at its power limit slows down as it gets warm"
    )
    speed_only: bool = Field(False, description="skip the passes that measure exposed communication")
    mode: Literal[Mode, "both"] = Field(
        "full",
        description="what benchmarks time: whole forwards, or only what K, V and the next token need; each a row",
    )

    @property
    def modes(self) -> list[Mode]:
        """Every mode that a benchmark runs."""
        return ["full", "prefill_only"] if self.mode == "both" else [self.mode]


class RingConfig(Section):
    """The section ``"ds_ring"``."""

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("parallel") == "auto":
            return {**values, "parallel": {"auto": True}}
        return values

    model: str | None = Field(
        None, description="checkpoint directory (safetensors), or a hub id that is in the local cache"
    )
    parallel: ParallelConfig = ParallelConfig()
    workload: WorkloadConfig = WorkloadConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    transport: TransportName = Field(
        "auto",
        description="how K/V, heads and a pipeline's hidden states move between ranks; auto: by copy engine inside a "
        "host whose GPUs reach each other, else by process groups, for each axis by itself",
    )
    interleave: Literal["auto", "on", "off"] = Field(
        "auto",
        description="two micro-batches in flight, one's transfers under the other's layers; auto: for sequences shared "
        "by copy engine; on: also beside NCCL's kernels, and for tp_size without pp_size",
    )
    in_flight: int = Field(
        2,
        ge=2,
        description="micro-batches in flight where sequences are shared and interleaved; more than two go through each "
        "layer together, so that transfers come close together and links may sleep in between",
    )
    timeout_s: int = Field(
        1800,
        ge=0,
        description="seconds in a call without a new communication after which a launched rank ends; 0: never",
    )
    start_timeout_s: int = Field(
        60,
        ge=1,
        description="seconds from the first rank that is ready to connect to the last; some may take longer to read "
        "their packages",
    )
    decode_graph: Literal["auto", "on", "off"] = Field(
        "auto",
        description="steps of a generation as CUDA graphs; auto: where the model allows, except with tp_size or "
        "pp_size",
    )
    fusion: FusionChoice = Field(
        "auto", description="auto puts neighbouring operations of a layer together where they are recognised"
    )
