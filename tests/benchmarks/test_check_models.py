"""The check of architectures: its small models and its page."""

import sys

import pytest

from benchmarks.models import models_page, trials
from benchmarks.models.tiny_models import SIZES, architectures, ropes_of, tiny_config
from ds_ring.errors import InputError
from tests.helpers.pages import tables

SCRIPT = [sys.executable, "launch/check_models.py"]


def document(layout, **outcomes):
    errors = {"works": {"max_rel_error": 1e-6}, "differs": {"max_rel_error": 0.5}}
    rows = [
        {"model_type": name, "class": name.upper(), "outcome": outcome, "detail": detail, **errors.get(outcome, {})}
        for name, (outcome, detail) in outcomes.items()
    ]
    general = {
        "length": 75,
        "new_tokens": 64,
        "versions": {"transformers": "1"},
        "command": "check",
        "git": "abc",
        "date": "2001",
    }
    return {"layout": layout, "rows": rows, **general}


def test_a_table_of_several_layouts():
    ring = document("ring2", a=("works", ""), b=("works", ""), c=("refused", "no | way"), d=("works", ""))
    shared = document(
        "tp2_pp2", a=("works", "a tie"), b=("refused", "it is fused"), c=("refused", "no"), d=("differs", "token 3")
    )
    text = models_page.text([ring, shared])
    works, works_in_some, refused, differs = tables(text)
    assert works == [{"type": "a", "class": "A", "max error": "1.0e-06 tp2_pp2: a tie"}]
    assert works_in_some == [{"type": "b", "class": "B", "why": "ring2. tp2_pp2: it is fused"}]
    assert refused == [{"type": "c", "class": "C", "why": "no \\| way"}]
    assert differs == [{"type": "d", "class": "D", "max error": "5.0e-01 tp2_pp2: token 3"}]
    assert "## works: 1" in text.splitlines()
    with pytest.raises(InputError, match="tp2_pp2 and ring2 differ in new_tokens"):
        models_page.text([ring, shared | {"new_tokens": 1}])


def test_a_kind_of_rope_has_a_line_of_its_own():
    rows = document("ring2", a=("works", ""))
    rows["rows"].append(rows["rows"][0] | {"rope": "longrope", "max_rel_error": 2e-6})
    (works,) = tables(models_page.text([rows]))
    assert [(line["type"], line["max error"]) for line in works] == [("a", "1.0e-06"), ("a (longrope)", "2.0e-06")]


def test_lengths_are_on_both_sides_of_every_threshold():
    assert trials.thresholds(tiny_config("gpt2")) == []
    assert trials.lengths(tiny_config("gpt2")) == [75]
    assert trials.thresholds(tiny_config("mistral")) == [24]  # its window
    assert trials.lengths(tiny_config("mistral")) == [12, 24, 25, 72, 75]
    for kind in ropes_of("mistral"):
        assert trials.thresholds(tiny_config("mistral", kind)) == [24, 32]


def test_small_configs_keep_one_layer_of_each_kind():
    assert {"llama", "gpt2", "gpt_oss", "qwen3"} <= set(architectures())
    config = tiny_config("gpt_oss")
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert (config.num_hidden_layers, config.hidden_size, config.sliding_window) == (2, 48, SIZES["sliding_window"])
    assert tiny_config("llama").num_hidden_layers == 2
