"""What is not finite is never timed as if it were a result, nor compared with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.layouts import bench, parity
from ds_ring.cli.scoring_job import figures_of
from ds_ring.config import RunConfig
from ds_ring.engine.engine import Engine
from ds_ring.errors import NumericsError
from ds_ring.utils import strict_json
from tests.helpers.launching import save
from tests.helpers.mocked_world import outcome, serve
from tests.helpers.tiny_models import build, gpt_neox, tokens

HEAD = "the head gave NaN or infinity, on rank 0, 1, behind 2 layers that are finite; check the weights"
LAST_RANK = HEAD.replace("0, 1", "1")


@pytest.fixture(autouse=True)
def _model_is_not_built_to_be_counted(monkeypatch):
    """Ranks are threads, which share the default device that counting on meta tensors sets."""
    monkeypatch.setattr(bench, "layer_parameters", lambda config: [1, 1])


def measured(engine: Engine, folder: Path, say: list[str]) -> Exception | None:
    engine.runner.run_config = RunConfig.load(engine.run_config, model=str(folder))
    return outcome(lambda: list(bench.measure(engine, {}, say.append)))


def spoilt() -> torch.nn.Module:
    model = build(gpt_neox(heads=2, layers=2, vocab_size=257))
    model.get_output_embeddings().weight.data[5, 0] = float("nan")
    return model


@pytest.mark.parametrize("mode", ["full", "prefill_only"])
@pytest.mark.parametrize("layout", [{"ring_degree": 2, "ring_impl": "contiguous"}, {"pp_size": 2}, {"dp_size": 2}])
def test_bench_refuses_weights_that_are_not_finite(tmp_path, mode, layout):
    """Without references too, on every rank alike, and before anything is timed."""
    folder, said = save(tmp_path / "model", gpt_neox(heads=2, layers=2, vocab_size=257)), list[str]()
    # The last token's rank makes its logits; where only next tokens are asked for, all that share a sequence do.
    message = HEAD if "dp_size" in layout or (mode == "prefill_only" and "ring_degree" in layout) else LAST_RANK
    options = {"max_length": 32, "batch_size": 2, "speed_only": True, "mode": mode, **layout}
    for error in serve(spoilt(), lambda engine: measured(engine, folder, said), **options):
        assert isinstance(error, NumericsError)
        assert str(error).startswith(message)
    assert not any("timed" in line for line in said)


def test_a_pass_that_goes_wrong_while_it_is_timed_is_refused(tmp_path):
    folder, said = save(tmp_path / "model", gpt_neox(heads=2, layers=2, vocab_size=257)), list[str]()

    def work(engine: Engine) -> Exception | None:
        calls = []

        def late(module: object, args: object, out: Tensor) -> Tensor:
            calls.append(0)
            return out * math.nan if len(calls) > 2 else out  # after the pass that is counted, and a warm-up

        engine.runner.decoder.layers[1].register_forward_hook(late)
        return measured(engine, folder, said)

    (error,) = serve(build(gpt_neox(heads=2, layers=2, vocab_size=257)), work, max_length=32)
    assert isinstance(error, NumericsError)
    assert str(error).startswith("layer 1 of 2 gave NaN or infinity, on rank 0;")
    assert "timed passes" in said[-1]


def test_a_reference_that_is_not_finite_is_no_reference(tmp_path):
    with pytest.raises(NumericsError, match=r"^the unsharded model gave NaN or infinity; check the weights"):
        parity.write_reference(spoilt(), tokens(1, 20), tmp_path / "reference")
    assert not (tmp_path / "reference").exists()


@pytest.mark.parametrize("compare", [parity.compare, parity.compare_last])
def test_an_engine_that_is_not_finite_is_not_compared(tmp_path, compare):
    parity.write_reference(build(gpt_neox(heads=2, layers=2, vocab_size=257)), tokens(1, 20), tmp_path / "reference")
    for error in serve(spoilt(), lambda e: outcome(lambda: compare(e, tmp_path / "reference")), ring_degree=2):
        assert isinstance(error, NumericsError)
        assert str(error).startswith(HEAD)


@pytest.mark.parametrize(("nll", "perplexity"), [(2.0, math.exp(2.0)), (709.0, math.exp(709)), (800.0, None)])
def test_a_perplexity_above_all_numbers_is_null(nll, perplexity):
    found = figures_of(3, -3 * nll)
    assert found == {"scored": 3, "nll": nll, "perplexity": perplexity, "log_likelihood": -3 * nll}
    assert json.loads(strict_json.dumps(found)) == found
