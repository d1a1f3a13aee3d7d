"""``docs/configuration.md``, from the fields themselves.

python -m ds_ring.config.page > docs/configuration.md
"""

from __future__ import annotations

import sys
import typing
from typing import Any, Literal

from pydantic.fields import FieldInfo

from ds_ring.config.run_config import DTYPE_NAMES
from ds_ring.config.sections import BenchmarkConfig, ParallelConfig, RingConfig, Section, WorkloadConfig
from ds_ring.utils import strict_json
from ds_ring.utils.checkpoint_dtype import AUTO

SECTIONS: dict[str, type[Section]] = {
    "parallel": ParallelConfig, "workload": WorkloadConfig, "benchmark": BenchmarkConfig,
}  # fmt: skip
EXAMPLE: dict[str, Any] = {
    "dtype": "bf16",
    "tensor_parallel": {"tp_size": 1},
    "ds_ring": {
        "model": "checkpoints/model",
        "parallel": {"ring_degree": 2, "ulysses_degree": 2},
        "workload": {"max_length": 131072},
        "transport": "auto",
    },
}
TEXT = """# Configuration

Made by `python -m ds_ring.config.page` from the fields in `ds_ring/config/sections.py`; not to be edited by hand.

A run is one JSON file. DeepSpeed's own keys stay where DeepSpeed has them and are handed to it; ours are in the section
`"ds_ring"`. Everything has a default, a key that is not known is refused by name, and so is a value out of range,
before anything is loaded.

```json
{example}
```

The same fields are keyword arguments of `ds_ring.from_pretrained` and `ds_ring.init_inference`, and all but those of
`benchmark` are options of every command: `--config FILE`, then for example `--ring-degree 4`, or `--set NAME=VALUE` for
those that have no option there. An argument or option wins over the file. Accelerate's `ParallelismConfig` is taken as
`parallelism_config=`: its `cp_size` is `ring_degree`, its `sp_size` is `ulysses_degree`, its `dp_replicate_size` is
`dp_size`.

Degrees multiply: `dp_size · pp_size · ring_degree · ulysses_degree · tp_size` is the number of ranks. Whether a model
allows them is checked before weights are read, and the error says what would be possible, for example
`num_heads=28 is not divisible by ulysses_degree=8; try 2, 4, 7, 14 or 28`.

## DeepSpeed's keys

| key | default | meaning |
| --- | --- | --- |
| `dtype` | `auto`, the checkpoint's | of weights and activations: {dtypes} |
| `tensor_parallel`: `tp_size` | `1` | ranks that share each layer's weights, by DeepSpeed's AutoTP |
| `zero_optimization`: `stage` | `0` | 3: ranks that share a sequence hold the weights between them; as an argument or \
option `weights`: `whole`, `sharded`, `streamed` |
| `zero_optimization`: `offload_param`: `device` | `none` | `cpu`: with stage 3, weights are streamed from the host |
| `zero_optimization`: `zero_hpz_partition_size` | the ranks of a host that share a sequence | ranks that hold one \
copy of the weights between them; as an argument or by `--set`: `weights_degree` |

`zero` is another name for `zero_optimization`. Both are read here ([weights.md](weights.md)); any other key is handed
to `deepspeed.init_inference` as it is.
"""


def text() -> str:
    """The whole page."""
    example = strict_json.dumps(EXAMPLE, indent=1, ensure_ascii=False)
    parts = [TEXT.format(example=example, dtypes=", ".join(f"`{name}`" for name in sorted([*DTYPE_NAMES, AUTO])))]
    own = {name: field for name, field in RingConfig.model_fields.items() if name not in SECTIONS}
    parts.append(_section("Section `ds_ring`", "", own))
    for name, section in SECTIONS.items():
        parts.append(_section(f"Section `ds_ring.{name}`", section.__doc__ or "", section.model_fields))
    return "\n".join(parts)


def _section(title: str, about: str, fields: dict[str, FieldInfo]) -> str:
    rows = [
        f"| `{name}` | {_values(field)} | {_default(field)} | {field.description} |" for name, field in fields.items()
    ]
    about = about.replace("``", "`")
    return "\n".join([f"## {title}", "", *([about, ""] if about else []), *HEAD, *rows, ""])


HEAD = ("| field | values | default | meaning |", "| --- | --- | --- | --- |")


def _values(field: FieldInfo) -> str:
    """What it may be, as a user writes it in JSON."""
    at_least = next((bound.ge for bound in field.metadata if hasattr(bound, "ge")), None)
    return _name(field.annotation) + ("" if at_least is None else f", at least {at_least}")


def _name(annotation: Any) -> str:
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if typing.get_origin(annotation) is tuple:
        return f"list: {_name(inner[0])}"
    if inner:  # a union
        return " or ".join(_name(one) for one in inner if one is not type(None))
    return {bool: "`true`, `false`", int: "whole number", str: "text"}[annotation]


def _default(field: FieldInfo) -> str:
    default = field.default
    return "none" if default is None else f"`{strict_json.dumps(default)}`"


if __name__ == "__main__":
    sys.stdout.write(text())
