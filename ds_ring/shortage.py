"""Out of memory, explained: what was predicted, what was held, and what to change."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ds_ring.errors import is_out_of_memory
from ds_ring.hardware import memory_gib
from ds_ring.hf.flops import matrix_elements
from ds_ring.memory import peak_bytes

if TYPE_CHECKING:
    from ds_ring.engines.base import Engine

Method = TypeVar("Method", bound=Callable[..., Any])


def explained(method: Method) -> Method:
    """An engine's method whose error, where memory ran out, says so in a note (``BaseException.add_note``)."""

    @wraps(method)
    def call(engine: Any, *args: Any, **options: Any) -> Any:
        try:
            return method(engine, *args, **options)
        except Exception as error:
            if is_out_of_memory(error) and not getattr(error, "__notes__", None):
                error.add_note(explanation(engine))
            raise

    return cast(Method, call)


def explanation(engine: Engine) -> str:
    """One line, about the configuration's own batch and length."""
    config, work, t = engine.config, engine.config.workload, engine.mesh.topology
    micro, own = config.largest_micro_batch, sum(map(matrix_elements, engine.anatomy.layers))
    predicted = peak_bytes(config, engine.shape, own * t.tp * t.pp, micro) / 2**30
    held, whole = engine.peak_memory_gib, memory_gib(engine.device)
    return (
        f"{held:.1f} GiB were held" + (f" of {whole:.1f}" if whole else "") + f", {predicted:.1f} are predicted for "
        f"micro-batches of {micro} x {work.max_length} tokens; lower micro_batch_size or max_length, or share each "
        f"sequence among more ranks (ring_degree, ulysses_degree)"
    )
