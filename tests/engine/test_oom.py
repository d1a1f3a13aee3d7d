"""Out of memory: what was predicted and held, and what to change, beside what the allocator says."""

import re
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import ds_ring
from ds_ring import api
from ds_ring.config import RunConfig
from ds_ring.engine import oom
from ds_ring.engine.engine import Engine
from ds_ring.engine.oom import GIB
from ds_ring.model_dims import ModelDims
from tests.helpers.generation import GREEDY, padded
from tests.helpers.mocked_launch import mocked_launch
from tests.helpers.mocked_world import outcome, serve
from tests.helpers.tiny_models import build, gpt_neox, tokens


@pytest.mark.parametrize("layout", [{"ring_degree": 2}, {"dp_size": 2}], ids=str)
@pytest.mark.parametrize("reason", ["CUDA out of memory. Tried to allocate 2.00 GiB", "shapes do not match"])
def test_an_engine_s_error_is_explained_where_memory_ran_out(layout, reason, monkeypatch):
    asked = []
    monkeypatch.setattr(oom, "peak_bytes", lambda *args: asked.append(args[1:]) or 5.25 * 2**30)

    def work(engine: Engine) -> Exception | None:
        def fails(*_: object) -> None:
            raise RuntimeError(reason) if "shapes" in reason else torch.OutOfMemoryError(reason)

        engine.runner.decoder.layers[1].register_forward_pre_hook(fails)
        return outcome(lambda: engine(tokens(4, 24)))

    model = build(gpt_neox(heads=4))
    for error in serve(model, work, max_length=24, batch_size=4, micro_batch_size=3, **layout):
        assert str(error).startswith(reason)
        notes = getattr(error, "__notes__", [])
        if "shapes" in reason:
            assert notes == asked == []
            continue
        (note,) = notes
        sequences = 2 if "dp_size" in layout else 3
        assert re.fullmatch(
            rf"[\d.]+ GiB were held, 5\.2 are predicted for micro-batches of {sequences} x 24 tokens; "
            r"lower micro_batch_size or max_length, or share each sequence among more ranks .*",
            note,
        )
        linear = sum(p.numel() for layer in model.gpt_neox.layers for p in layer.parameters() if p.dim() >= 2)
        assert asked[0][1:] == (linear, sequences)


LAYOUTS: list[dict[str, Any]] = [{"ring_degree": 2}, {"dp_size": 2}, {"tp_size": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("chunk", [0, 7])
def test_a_generation_s_prediction_is_of_its_own_rows_and_cache(layout, chunk, monkeypatch):
    asked = []

    def peak(run: RunConfig, *args: Any) -> float:
        asked.append((run.workload.max_length, args[-1]))
        return 5.25 * GIB

    def cache(run: RunConfig, dims: ModelDims, sequences: int, length: int) -> float:
        asked.append((sequences, length))
        return 1.5 * GIB

    monkeypatch.setattr(oom, "peak_bytes", peak)
    monkeypatch.setattr(oom, "cache_bytes", cache)
    ids, mask = padded([24, 20, 3, 5])

    def work(engine: Engine) -> Exception | None:
        def fails(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        for layer in engine.runner.decoder.layers:
            layer.register_forward_pre_hook(fails)
        return outcome(lambda: engine.generate(ids, mask, max_new_tokens=6, **GREEDY))

    sizes = {"max_length": 10, "batch_size": 2, "micro_batch_size": 3, "prefill_chunk": chunk}
    sequences, shorter = 2 if "dp_size" in layout else 4, "lower" if chunk else "set"
    micro, names = min(sequences, 3), "tp_size, pp_size" if "tp_size" in layout else "ring_degree, ulysses_degree"
    for error in serve(build(gpt_neox(heads=4)), work, **sizes, **layout):
        (note,) = error.__notes__
        assert re.fullmatch(
            rf"[\d.]+ GiB were held, 6\.8 are predicted: 1\.5 for a cache of {sequences} x 30 tokens, the rest for "
            rf"weights and chunks of {micro} x {chunk or 24}; {shorter} prefill_chunk, give fewer rows or tokens at a "
            rf"time, or share them among more ranks \({names}\)",
            note,
        )
    assert set(asked) == {(chunk or 24, micro), (sequences, 30)}


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def weights_note(weights: int, dtype: str) -> str:
    narrower = "take dtype fp16 or bf16, or " if dtype == "fp32" else ""
    return (
        rf"[\d.]+ GiB were held, {weights}\.0 are predicted for this rank's weights in {dtype}; {narrower}raise "
        r"pp_size, with more GPUs: a stage loads its own layers alone, .*"
    )


@pytest.mark.parametrize("layout", [{}, {"pp_size": 2}], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_memory_that_runs_out_as_a_loaded_model_moves(dtype, layout, monkeypatch):
    model = build(gpt_neox(heads=4))
    monkeypatch.setattr(PreTrainedModel, "to", out_of_memory)
    monkeypatch.setattr(oom, "GIB", 1)
    with pytest.raises(torch.OutOfMemoryError) as error:
        serve(model, lambda engine: None, dtype=dtype, **layout)
    layers, norm = model.gpt_neox.layers, model.gpt_neox.final_layer_norm
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    stages = [[layers[:2], embedding], [layers[2:], norm, head]] if layout else [[model]]
    counts = [sum(p.numel() for part in stage for p in part.parameters()) for stage in stages]
    sizes = [count * (4 if dtype == "fp32" else 2) for count in counts]
    (note,) = error.value.__notes__
    assert any(re.fullmatch(weights_note(size, dtype), note) for size in sizes)


def test_memory_that_runs_out_as_a_checkpoint_loads(tmp_path, monkeypatch):
    model = build(gpt_neox(heads=4))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(api, "load_model", out_of_memory)
    monkeypatch.setattr(oom, "GIB", 1)
    (error,) = mocked_launch(
        lambda rank: outcome(lambda: ds_ring.from_pretrained(tmp_path, {"dtype": "fp16"})), 1, monkeypatch
    )
    (note,) = error.__notes__
    assert re.fullmatch(weights_note(2 * sum(p.numel() for p in model.parameters()), "fp16"), note)
