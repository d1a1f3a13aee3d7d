"""One JSON file a run: DeepSpeed's own keys, handed to it untouched, and ours in the section ``"ds_ring"``.

{"dtype": "fp16", "tensor_parallel": {"tp_size": 2},
 "ds_ring": {"model": "checkpoints/paper", "parallel": {"pp_size": 2}, "workload": {"max_length": 10000}}}
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from ds_ring.config.sections import (
    BASELINE_DEGREES,
    MOST,
    BenchmarkConfig,
    DType,
    ParallelConfig,
    RingConfig,
    Section,
    WorkloadConfig,
)
from ds_ring.config.weights import Weights, weights_degree_of, weights_of, with_weights
from ds_ring.errors import ConfigError
from ds_ring.parallel.topology import Topology
from ds_ring.utils import strict_json
from ds_ring.utils.checkpoint_dtype import AUTO, checkpoint_dtype
from ds_ring.utils.hub import local_checkpoint

DTYPE_NAMES: dict[str, DType] = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32", "torch.float32": "fp32",
    "fp16": "fp16", "float16": "fp16", "half": "fp16", "torch.float16": "fp16",
    "bf16": "bf16", "bfloat16": "bf16", "torch.bfloat16": "bf16",
}  # fmt: skip


class RunConfig(Section):
    """A whole run: ``ring`` is our section, ``deepspeed`` the rest of the file; ``checkpoint_dtype``: what the
    checkpoint says its weights are, where the file says nothing."""

    ring: RingConfig = RingConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    checkpoint_dtype: str | None = None

    @classmethod
    def load(cls, source: str | Path | dict[str, Any] | RunConfig | None, **overrides: Any) -> RunConfig:
        """Read a file (or take a dict in the file's form) and apply overrides by field name.

        Args:
            source: path, dict, RunConfig, or None for the defaults.
            overrides: any field of our section, or of its ``parallel``, ``workload`` or ``benchmark``; ``tp_size``;
                ``dtype``; ``weights`` and ``weights_degree``, see ``config/weights.py``; ``parallelism_config``,
                accelerate's. None means "as in the file".

        A dtype that neither gives, or "auto", is the checkpoint's own, else fp32, as in transformers
        (``utils.checkpoint_dtype``). In a RunConfig, too, it counts as not given, so that another ``model`` brings its
        own.

        Raises:
            ConfigError: unreadable file, unknown key, wrong type or a value out of range.
        """
        if isinstance(source, RunConfig):
            document = source._document(only_given=True)
        else:
            document = _read(source) if isinstance(source, str | Path) else dict(source or {})
        section = dict(_object("ds_ring", document.pop("ds_ring", {})))
        degrees = degrees_of(overrides.pop("parallelism_config", None))
        given = {name: value for name, value in overrides.items() if value is not None}
        for name, value in {**degrees, **given}.items():
            _override(document, section, name, value)
        for place, value in strict_json.not_finite({**document, "ds_ring": section}):
            raise ConfigError(f"{place}={value} is not a finite number, as JSON has them")
        if document.get("dtype") == AUTO:
            del document["dtype"]
        own = None if "dtype" in document else checkpoint_dtype(section.get("model"))
        try:
            config = cls(ring=RingConfig.model_validate(section), deepspeed=document, checkpoint_dtype=own)
        except ValidationError as error:
            raise ConfigError(_explain(error, source)) from None
        _ = config.dtype, config.tp_size, config.topology
        return config

    @property
    def parallel(self) -> ParallelConfig:
        return self.ring.parallel

    @property
    def workload(self) -> WorkloadConfig:
        return self.ring.workload

    @property
    def benchmark(self) -> BenchmarkConfig:
        return self.ring.benchmark

    @property
    def lengths(self) -> list[int]:
        """Every length that a benchmark runs, ascending."""
        return sorted({self.workload.max_length, *self.benchmark.sweep})

    @property
    def micro_batch_sizes(self) -> list[int]:
        """Every size of micro-batch that a benchmark runs, ascending."""
        return sorted(set(self.benchmark.micro_batch_sizes)) or [self.workload.micro_batch_size]

    @property
    def checkpoint(self) -> str:
        """The checkpoint directory, see ``utils.hub``; ConfigError where none was given."""
        if self.ring.model is None:
            raise ConfigError('no model: give a checkpoint directory, "model" in the section "ds_ring", or --model')
        path = local_checkpoint(self.ring.model)
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            pass  # what becomes of that is said by whoever reads it
        except OSError as error:
            raise ConfigError(f"model {self.ring.model} cannot be read: {error.strerror}") from None
        return str(path)

    @property
    def dtype(self) -> DType:
        name = str(self.deepspeed.get("dtype", self.checkpoint_dtype or "fp32"))
        if name not in DTYPE_NAMES:
            whose = "" if "dtype" in self.deepspeed else f", which the checkpoint {self.ring.model} says,"
            raise ConfigError(f'dtype="{name}"{whose} is not supported; take one of fp32, fp16, bf16, auto')
        return DTYPE_NAMES[name]

    @property
    def itemsize(self) -> int:
        """Bytes of a weight, and of an activation's element."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def tp_size(self) -> int:
        size = _object("tensor_parallel", self.deepspeed.get("tensor_parallel") or {}).get("tp_size", 1)
        if type(size) is not int or not 1 <= size <= MOST:
            raise ConfigError(f"tensor_parallel.tp_size={size!r} must be a whole number of at least 1")
        return size

    @property
    def weights(self) -> Weights:
        """Where weights are: whole on every rank; sharded among ranks; or streamed from the host's memory."""
        return weights_of(self.deepspeed)

    @property
    def topology(self) -> Topology:
        p = self.parallel
        shared = 1 if self.weights == "whole" else weights_degree_of(self.deepspeed) or p.ring_degree * p.ulysses_degree
        return Topology(p.dp_size, p.pp_size, p.ring_degree, p.ulysses_degree, self.tp_size, weights=shared)

    @property
    def largest_micro_batch(self) -> int:
        """Sequences of it, on the replica with the most."""
        return min(self.workload.micro_batch_size, math.ceil(self.workload.batch_size / self.parallel.dp_size))

    def micro_batches(self, size: int) -> int:
        """How many of ``size`` sequences make one pass, on the replica with the most."""
        return math.ceil(self.workload.batch_size / (self.parallel.dp_size * size))

    @property
    def label(self) -> str:
        """The name of this layout in tables and file names: its degrees, and how a ring goes about it where that is not
        left to it. Another implementation's says whose it is, and over which ranks where that is a choice."""
        topology, whose, p = self.topology, self.benchmark.implementation, self.parallel
        if whose == "ds_ring":
            chosen = [name for name in (p.ring_impl, p.ring_variant) if name not in ("zigzag", "auto")]
            weights = [] if self.weights == "whole" else [self.weights]
            return "_".join([topology.label(), *(chosen if topology.ring > 1 else []), *weights])
        replicas = f"dp{topology.dp}_" if topology.dp > 1 else ""
        shared = str(topology.sp) if len(BASELINE_DEGREES[whose]) == 1 else f"_{replace(topology, dp=1).label()}"
        return f"{replicas}{whose}{shared}"

    def facts(self) -> dict[str, Any]:
        """Every setting by its dotted path."""
        return flatten(self.document(), "")

    def document(self) -> dict[str, Any]:
        """The configuration in the file's own form, every default filled in."""
        return {"dtype": self.dtype, **self._document()}

    def _document(self, only_given: bool = False) -> dict[str, Any]:
        """The same, but for a dtype that was not given; ``only_given``: and without our fields that were not."""
        document = json.loads(strict_json.dumps(self.deepspeed, default=str))
        return {**document, "ds_ring": self.ring.model_dump(mode="json", exclude_unset=only_given)}


def degrees_of(parallelism_config: Any) -> dict[str, int]:
    """Our degrees for accelerate's ``ParallelismConfig``: its context parallelism (cp) is our ring, its sequence
    parallelism (sp) our Ulysses. It allows one of both; our own keys allow both at once.

    Raises:
        ConfigError: sharded data parallelism, which is about training.
    """
    if parallelism_config is None:
        return {}
    if (parallelism_config.dp_shard_size or 1) > 1:
        raise ConfigError(
            f"parallelism_config.dp_shard_size={parallelism_config.dp_shard_size}: weights are not sharded here; use "
            f"dp_replicate_size for replicas"
        )
    sizes = {
        "dp_size": parallelism_config.dp_replicate_size,
        "tp_size": parallelism_config.tp_size,
        "ring_degree": parallelism_config.cp_size,
        "ulysses_degree": parallelism_config.sp_size,
    }
    return {name: size for name, size in sizes.items() if size is not None and size > 1}


def flatten(value: Any, path: str) -> dict[str, Any]:
    """What is in nested dicts, by its dotted path below ``path``."""
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for name, inner in value.items() for k, v in flatten(inner, f"{path}.{name}".lstrip(".")).items()}


def _read(path: str | Path) -> dict[str, Any]:
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not JSON: it is not UTF-8 text") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply for a configuration") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(document).__name__}")
    return document


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a JSON object, not {value!r}")
    return value


def _override(document: dict[str, Any], section: dict[str, Any], name: str, value: Any) -> None:
    if name == "tp_size":
        given = _object("tensor_parallel", document.get("tensor_parallel") or {})
        document["tensor_parallel"] = {**given, "tp_size": value}
    elif name == "dtype":
        document["dtype"] = value
    elif name in ("weights", "weights_degree"):
        of = {"weights": value} if name == "weights" else {"degree": value}
        changed = with_weights(document, **of)
        document.clear()
        document.update(changed)
    elif name in ParallelConfig.model_fields:
        given = section.get("parallel", {})
        given = {"auto": True} if given == "auto" else _object("ds_ring.parallel", given)
        section["parallel"] = {**given, name: value}
    elif name in WorkloadConfig.model_fields:
        section["workload"] = {**_object("ds_ring.workload", section.get("workload", {})), name: value}
    elif name in BenchmarkConfig.model_fields:
        section["benchmark"] = {**_object("ds_ring.benchmark", section.get("benchmark", {})), name: value}
    elif name in RingConfig.model_fields:
        section[name] = value
    else:
        sections = (RingConfig, ParallelConfig, WorkloadConfig, BenchmarkConfig)
        known = [
            "tp_size",
            "dtype",
            "weights",
            "weights_degree",
            *(field for section in sections for field in section.model_fields),
        ]
        meant = get_close_matches(name, known, n=1, cutoff=0.8)
        raise ConfigError(f"there is no option {name}" + (f"; did you mean {meant[0]}?" if meant else ""))


def _explain(error: ValidationError, source: object) -> str:
    where = f" in {source}" if isinstance(source, str | Path) else ""
    lines = []
    for item in error.errors():
        path = ".".join(("ds_ring", *(str(p) for p in item["loc"])))
        if item["type"] == "extra_forbidden":
            known = _fields_at(item["loc"][:-1])
            lines.append(f"{path} is not a known key{where}; known here: {', '.join(known)}")
        else:
            lines.append(f"{path}={item['input']!r}{where}: {item['msg']}")
    return "; ".join(lines)


def _fields_at(path: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = RingConfig
    for name in path:
        annotation = model.model_fields[str(name)].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        model = annotation
    return sorted(model.model_fields)
