"""Out of memory: what was predicted and held, and what to change, beside what the allocator says."""

import re
from typing import Any

import pytest
import torch
from generated import GREEDY, padded
from mocked_world import outcome, serve
from tiny_models import build, gpt_neox, tokens

from ds_ring import shortage
from ds_ring.checks import ModelShape
from ds_ring.config import RunConfig
from ds_ring.engines.base import Engine
from ds_ring.shortage import GIB


@pytest.mark.parametrize("layout", [{"ring_degree": 2}, {"dp_size": 2}], ids=str)
@pytest.mark.parametrize("reason", ["CUDA out of memory. Tried to allocate 2.00 GiB", "shapes do not match"])
def test_an_engine_s_error_is_explained_where_memory_ran_out(layout, reason, monkeypatch):
    asked = []
    monkeypatch.setattr(shortage, "peak_bytes", lambda *args: asked.append(args[1:]) or 5.25 * 2**30)

    def work(engine: Engine) -> Exception | None:
        def fails(*_: object) -> None:
            raise RuntimeError(reason) if "shapes" in reason else torch.OutOfMemoryError(reason)

        engine.anatomy.layers[1].register_forward_pre_hook(fails)
        return outcome(lambda: engine(tokens(4, 24)))

    model = build(gpt_neox(heads=4))
    for error in serve(model, work, max_length=24, batch_size=4, micro_batch_size=3, **layout):
        assert str(error).startswith(reason)
        notes = getattr(error, "__notes__", [])
        if "shapes" in reason:
            assert notes == asked == []
            continue
        (note,) = notes
        rows = 2 if "dp_size" in layout else 3
        assert re.fullmatch(
            rf"[\d.]+ GiB were held, 5\.2 are predicted for micro-batches of {rows} x 24 tokens; "
            r"lower micro_batch_size or max_length, or share each sequence among more ranks .*",
            note,
        )
        linear = sum(p.numel() for layer in model.gpt_neox.layers for p in layer.parameters() if p.dim() >= 2)
        assert asked[0][1:] == (linear, rows)


LAYOUTS: list[dict[str, Any]] = [{"ring_degree": 2}, {"dp_size": 2}, {"tp_size": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("chunk", [0, 7])
def test_a_generation_s_prediction_is_of_its_own_rows_and_cache(layout, chunk, monkeypatch):
    asked = []

    def peak(run: RunConfig, *args: Any) -> float:
        asked.append((run.workload.max_length, args[-1]))
        return 5.25 * GIB

    def cache(run: RunConfig, shape: ModelShape, rows: int, length: int) -> float:
        asked.append((rows, length))
        return 1.5 * GIB

    monkeypatch.setattr(shortage, "peak_bytes", peak)
    monkeypatch.setattr(shortage, "cache_bytes", cache)
    ids, mask = padded([24, 20, 3, 5])

    def work(engine: Engine) -> Exception | None:
        def fails(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        for layer in engine.anatomy.layers:
            layer.register_forward_pre_hook(fails)
        return outcome(lambda: engine.generate(ids, mask, max_new_tokens=6, **GREEDY))

    sizes = {"max_length": 10, "batch_size": 2, "micro_batch_size": 3, "prefill_chunk": chunk}
    rows, shorter = 2 if "dp_size" in layout else 4, "lower" if chunk else "set"
    micro, names = min(rows, 3), "tp_size, pp_size" if "tp_size" in layout else "ring_degree, ulysses_degree"
    for error in serve(build(gpt_neox(heads=4)), work, **sizes, **layout):
        (note,) = error.__notes__
        assert re.fullmatch(
            rf"[\d.]+ GiB were held, 6\.8 are predicted: 1\.5 for a cache of {rows} x 30 tokens, the rest for weights "
            rf"and chunks of {micro} x {chunk or 24}; {shorter} prefill_chunk, give fewer rows or tokens at a time, or "
            rf"share them among more ranks \({names}\)",
            note,
        )
    assert set(asked) == {(chunk or 24, micro), (rows, 30)}
