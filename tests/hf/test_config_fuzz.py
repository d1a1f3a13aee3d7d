"""200 mutations of config.json: each is refused in one line before weights load, or the model loads and computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from ds_ring.config import RunConfig
from ds_ring.engine.dry_run import dry_run
from ds_ring.errors import UserError
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.hf.dims import model_dims
from ds_ring.hf.flops import linear_parameters
from ds_ring.hf.loading import load_model, load_stage
from ds_ring.hf.tensor_fit import check_fit
from ds_ring.planning import plan
from ds_ring.planning.cards import CARDS
from ds_ring.planning.validation import check_layout
from ds_ring.utils import model_config
from ds_ring.utils.corpus import load_tokenizer
from ds_ring.utils.model_config import read_config
from tests.helpers.config_mutations import mutations
from tests.helpers.tiny_models import ARCHITECTURES, build, logits, tokens

MUTATIONS = {"llama_gqa": 80, "gemma3": 40, "mixtral": 40, "gpt_neox": 40}
CPU = torch.device("cpu")


def prepared(folder: Path) -> None:
    """All that commands do before they read weights."""
    run = RunConfig.load({}, model=str(folder))
    checkpoint, config = Checkpoint.open(folder), read_config(folder)
    dims = model_dims(config)
    check_layout(run, dims, 1)
    plan.plans(run, dims, linear_parameters(config), 2, CARDS["H100"])
    dry_run(config, run)
    check_fit(checkpoint, config)
    load_tokenizer(folder)


@pytest.mark.parametrize(("name", "count"), MUTATIONS.items(), ids=MUTATIONS.keys())
def test_a_mutated_config_is_refused_in_one_line_or_works(name, count, tmp_path, monkeypatch):
    monkeypatch.setattr(model_config, "BLAME_S", 0.1)  # names of fields are the subject of another test
    build(ARCHITECTURES[name]()).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    prepared(tmp_path)
    file, ids, refused, worked = tmp_path / "config.json", tokens(1, 30), [], []
    for said, fields in mutations(json.loads(file.read_text()), count, seed=19):
        file.write_text(json.dumps(fields))
        try:
            prepared(tmp_path)
        except UserError as error:
            refused.append((said, str(error)))
            continue
        except Exception as error:
            raise AssertionError(said) from error
        worked.append(said)
        whole, stage = load_model(tmp_path, torch.float32, CPU), load_stage(tmp_path, torch.float32, CPU, range(1))
        assert logits(whole, ids).isfinite().all(), said
        assert stage.config.get_text_config().num_hidden_layers == 1
    assert [said for said, words in refused if "\n" in words] == []
    # Neither half is empty: a check that refuses all, or nothing, would pass.
    assert min(len(refused), len(worked)) > count // 8


def test_there_are_as_many_mutations_as_the_target_says():
    assert sum(MUTATIONS.values()) == 200
    drawn = [said for said, _ in mutations({"a": 1, "b": {"c": 2}}, 100, seed=0)]
    assert len({*drawn}) == 100
    assert drawn == [said for said, _ in mutations({"a": 1, "b": {"c": 2}}, 100, seed=0)]
