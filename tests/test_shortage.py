"""Out of memory: what was predicted and held, and what to change, beside what the allocator says."""

import re

import pytest
import torch
from mocked_world import outcome, serve
from tiny_models import build, gpt_neox, tokens

from ds_ring import shortage
from ds_ring.engines.base import Engine


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
