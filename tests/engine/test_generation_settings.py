"""Settings that a checkpoint's generation_config.json carries: served as transformers does, left out, or refused."""

from __future__ import annotations

import copy
import inspect
import json
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import CompileConfig, GenerationMixin, WatermarkingConfig

from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from ds_ring.engine import generate_args
from ds_ring.engine.engine import Engine
from ds_ring.errors import CheckpointError, InputError
from ds_ring.hf import generation_callbacks, generation_settings
from ds_ring.hf.generation_fields import FIELDS
from ds_ring.hf.generation_settings import read_generation_config
from tests.helpers.generation import tokens
from tests.helpers.mocked_world import outcome, serve
from tests.helpers.tiny_models import build, llama_gqa

IDS = tokens(1, 20)
CALL: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build(llama_gqa(vocab_size=257))


@pytest.fixture(scope="module")
def plain(model) -> list[int]:
    """The new tokens of greedy search without any setting."""
    return generated(model, {}, CALL)


def generated(model: PreTrainedModel, fields: dict[str, Any], call: dict[str, Any]) -> list[int]:
    """transformers' own new tokens, with ``fields`` as the checkpoint's."""
    whole = copy.deepcopy(model)
    set_fields(whole, fields)
    torch.manual_seed(0)
    with torch.no_grad():
        found: Any = whole.generate(IDS, attention_mask=torch.ones_like(IDS), **call)
    return (found if isinstance(found, Tensor) else found.sequences)[:, 20:].tolist()


def set_fields(model: PreTrainedModel, fields: dict[str, Any]) -> None:
    for name, value in {"eos_token_id": None, "bos_token_id": None, **fields}.items():
        setattr(model.generation_config, name, value)


def served(engine: Engine, fields: dict[str, Any], call: dict[str, Any]) -> list[int]:
    kept = copy.deepcopy(engine.model.generation_config)
    set_fields(engine.model, fields)
    torch.manual_seed(0)
    try:
        found: Any = engine.generate(IDS, **call)
    finally:
        engine.model.generation_config = kept
    return (found if isinstance(found, Tensor) else found.sequences)[:, 20:].tolist()


def test_every_setting_of_the_installed_transformers_is_decided():
    assert [name for name in vars(GenerationConfig()) if name not in FIELDS and name != "_original_object_hash"] == []
    assert "_commit_hash" in FIELDS  # of transformers 5.17


def test_every_argument_of_transformers_generate_is_decided():
    known = {*generate_args.REFUSED, *generation_callbacks.OF_CALLER, *inspect.signature(Engine.generate).parameters}
    given = [*inspect.signature(GenerationMixin.generate).parameters, "position_ids", "inputs_embeds", "tokenizer"]
    assert [name for name in given if name not in known] == ["kwargs"]


def test_a_setting_that_a_later_transformers_brings_is_refused(monkeypatch):
    config = GenerationConfig()
    config.new_search = 3
    asked = generation_settings.Asked.of(config, None, {})
    generation_settings.admit(asked, 100)  # an entry of the checkpoint's own
    monkeypatch.setattr(generation_settings, "GenerationConfig", lambda: config)
    with pytest.raises(InputError, match=r"does not serve new_search=3 of the checkpoint's generation_config\.json"):
        generation_settings.admit(asked, 100)


GREEDY_FIELDS: dict[str, dict[str, Any]] = {
    "temperature without sampling": {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
    "temperature 0 without sampling": {"temperature": 0.0},
    "max_new_tokens": {"max_new_tokens": 2048},
    "max_length": {"max_length": 4096},
    "min_length": {"min_length": 26, "eos_token_id": list(range(0, 257, 2))},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": list(range(0, 257, 2))},
    "eos_token_id": {"eos_token_id": list(range(0, 257, 2))},
    "repetition_penalty": {"repetition_penalty": 1.05},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": [7, 8]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [2, 1.9], "eos_token_id": 3},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True},
    "return_dict_in_generate": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=9.0)},
    "prefill_chunk_size": {"prefill_chunk_size": 7},
    "a setting of its own": {"chat_format": "chatml"},
}  # fmt: skip


def of_tokens(plain: list[int]) -> dict[str, dict[str, Any]]:
    """Settings that name tokens which greedy search would choose."""
    first, second = plain[0][:2]
    return {
        "suppress_tokens": {"suppress_tokens": [first, 300]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [first]},
        "bad_words_ids": {"bad_words_ids": [[first], [second, first]]},
        "sequence_bias": {"sequence_bias": [[[first], -20.0]]},
    }


@pytest.mark.parametrize("layout", [{"ring_degree": 2}, {"pp_size": 2}], ids=str)
def test_what_is_served_gives_transformers_tokens(model, plain, layout):
    cases = {**GREEDY_FIELDS, **of_tokens(plain)}
    want = {name: generated(model, fields, CALL) for name, fields in cases.items()}
    for got in serve(model, lambda e: {name: served(e, fields, CALL) for name, fields in cases.items()}, **layout):
        assert got == want
    changed = {name for name, found in want.items() if found != plain}
    assert changed >= {
        "min_length", "min_new_tokens", "eos_token_id", "encoder_no_repeat_ngram_size", "forced_eos_token_id",
        "exponential_decay_length_penalty", "watermarking_config", *of_tokens(plain),
    }  # fmt: skip


def test_stop_strings_of_a_checkpoint_need_the_tokenizer(model, plain):
    tokenizer = byte_tokenizer()
    characters = [tokenizer.decode([token]) for token in plain[0]]
    # The first that is a character by itself, and not the first of all.
    fields = {"stop_strings": [next(c for c in characters[1:-1] if c.isascii() and c != characters[0])]}
    want = generated(model, fields, {**CALL, "tokenizer": tokenizer})
    assert len(want[0]) < 8

    def work(engine: Engine) -> tuple[list[int], str]:
        error = outcome(lambda: served(engine, fields, CALL))
        return served(engine, fields, {**CALL, "tokenizer": tokenizer}), str(error)

    for got, refused in serve(model, work, ring_degree=2):
        assert got == want
        assert "you must pass the model's tokenizer to the `tokenizer` argument of `generate`" in refused


SAMPLED: dict[str, dict[str, Any]] = {
    "plain": {}, "temperature": {"temperature": 0.6}, "top_k": {"top_k": 5}, "top_p": {"top_p": 0.3},
    "min_p": {"min_p": 0.3}, "top_h": {"top_h": 0.4}, "typical_p": {"typical_p": 0.3},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01}, "eta_cutoff": {"eta_cutoff": 0.05},
    "num_return_sequences": {"num_return_sequences": 3},
}  # fmt: skip


def test_sampling_settings_draw_what_transformers_draws(model):
    """On one rank: ranks that are threads share one random state."""
    cases = {name: {"do_sample": True, **fields} for name, fields in SAMPLED.items()}
    want = {name: generated(model, fields, CALL) for name, fields in cases.items()}
    (got,) = serve(model, lambda e: {name: served(e, fields, CALL) for name, fields in cases.items()})
    assert got == want
    assert len(got["num_return_sequences"]) == 3


LEFT_OUT: dict[str, dict[str, Any]] = {
    "gemma": {"cache_implementation": "hybrid"},
    "static": {"cache_implementation": "static", "max_cache_len": 100},
    "dynamic": {"cache_implementation": "dynamic"},
    "quantized": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
    "trained": {"use_cache": False},
    "compiled": {"compile_config": CompileConfig()},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "attentions": {"output_attentions": True},
    "hidden": {"output_hidden_states": True, "return_dict_in_generate": True},
    "beams": {"early_stopping": True, "length_penalty": 2.0},
    "never": {"eos_token_id": -1},
    "beyond": {"eos_token_id": [300]},
}


def test_what_no_token_depends_on_is_left_out_with_a_line(model, plain, caplog):
    """What a training left behind, or how transformers lays out its own cache."""
    generation_settings._say.cache_clear()
    with caplog.at_level(logging.WARNING, logger="ds_ring"):
        for got in serve(
            model, lambda e: {name: served(e, fields, CALL) for name, fields in LEFT_OUT.items()}, ring_degree=2
        ):
            assert got == dict.fromkeys(LEFT_OUT, plain)
    said = [record.getMessage() for record in caplog.records if record.name == "ds_ring"]
    file = " of the checkpoint's generation_config.json"
    assert [text for text in said if "compile_config" not in text] == [
        f"generate leaves out {what}: no token depends on it"
        for what in (
            f"cache_implementation='static'{file}, max_cache_len=100{file}",
            f"cache_implementation='quantized'{file}, cache_config={{'backend': 'quanto'}}{file}",
            f"use_cache=False{file}", f"prompt_lookup_num_tokens=3{file}", f"output_attentions=True{file}",
            f"output_hidden_states=True{file}", f"early_stopping=True{file}, length_penalty=2.0{file}",
            f"id -1 of eos_token_id{file}", f"id 300 of eos_token_id{file}",
        )
    ]  # fmt: skip
    assert sum("compile_config" in text for text in said) == 1


def test_a_call_that_repeats_the_checkpoints_settings_is_the_checkpoints(model, plain):
    def work(engine: Engine) -> tuple[list[int], str]:
        set_fields(engine.model, {"cache_implementation": "static"})
        repeated = copy.deepcopy(engine.model.generation_config)
        got = engine.generate(IDS, generation_config=repeated, **CALL)[:, 20:].tolist()
        repeated.cache_implementation = "offloaded"
        return got, str(outcome(lambda: engine.generate(IDS, generation_config=repeated, **CALL)))

    for got, refused in serve(model, work, ring_degree=2):
        assert got == plain
        assert refused.startswith("generate does not serve cache_implementation='offloaded' with a cache that is")


FILE = " of the checkpoint's generation_config.json"
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"num_beams": 4}, {}, f"does not serve beam_search (num_beams=4{FILE}) with a cache that is spread over ranks; it "
     "serves greedy search and sampling: num_beams=1; give num_beams=1 to generate, or take it out of that file"),
    ({"guidance_scale": 1.5}, {}, f"does not serve guidance_scale=1.5{FILE} with a cache that is spread over ranks; "
     "give guidance_scale=1 to generate, or take it out of that file"),
    ({"token_healing": True, "is_assistant": True}, {}, f"does not serve token_healing=True{FILE}, is_assistant=True"),
    ({"penalty_alpha": 0.6, "top_k": 4}, {}, f"does not serve contrastive_search (penalty_alpha=0.6{FILE})"),
    ({"dola_layers": "low"}, {}, "does not serve dola_generation (dola_layers='low'"),
    ({"num_return_sequences": 2}, {}, "Greedy methods (do_sample != True) without beam search do not support"),
    ({"max_length": 10}, {"max_new_tokens": None}, "nothing to generate: 20 tokens of input leave max_new_tokens=-10"),
    ({"eos_token_id": "2"}, {}, f"eos_token_id='2'{FILE} must be a token id or a list of them"),
    ({"eos_token_id": [2, None]}, {}, f"eos_token_id=[2, None]{FILE} must be a token id or a list of them"),
    ({"eos_token_id": 2.0}, {}, f"eos_token_id=2.0{FILE} must be a token id or a list of them"),
    ({"eos_token_id": True}, {}, f"eos_token_id=True{FILE} must be a token id or a list of them"),
    ({}, {"pad_token_id": [0]}, "pad_token_id=[0] must be a token id"),
    ({"forced_eos_token_id": 257}, {}, f"forced_eos_token_id has 257{FILE}, outside the vocabulary of 257"),
    ({"bad_words_ids": [[400]]}, {}, "the following tokens were being biased: [400]"),
    ({"suppress_tokens": 3}, {}, f"suppress_tokens=3{FILE} must be a list of token ids"),
    ({"repetition_penalty": "1.1"}, {}, f"repetition_penalty='1.1'{FILE} must be a finite number above 0"),
    ({"temperature": float("nan"), "do_sample": True}, {},
     f"temperature=nan{FILE} must be a finite number of at least 1e-30"),
    ({"exponential_decay_length_penalty": [2, 1.9]}, {}, "transformers refuses the options of generate: "),
    ({"stop_strings": []}, {}, f"stop_strings=[]{FILE} must be a string or a list of strings, none of them empty"),
    ({}, {"max_new_tokens": "8"}, "max_new_tokens='8' must be a whole number of at least 1"),
    ({}, {"cache_implementation": "static"}, "does not serve cache_implementation='static' with a cache"),
    ({}, {"prompt_lookup_num_tokens": 3}, "does not serve prompt_lookup_num_tokens=3 with a cache"),
    ({}, {"output_attentions": True, "output_hidden_states": True}, "output_attentions=True, output_hidden_states=Tru"),
    ({}, {"use_cache": False}, "use_cache=False: without a cache every token would cost a forward of the whole text"),
    ({}, {"generation_config": {"top_k": 1}}, "generation_config must be a GenerationConfig, not a dict"),
    ({}, {"assistant_tokenizer": "any"}, "does not serve assistant_tokenizer"),
]  # fmt: skip


def test_what_would_change_tokens_is_refused_by_name_and_origin(model):
    def work(engine: Engine) -> list[Exception | None]:
        return [outcome(lambda: served(engine, fields, {**CALL, **call})) for fields, call, _ in REFUSED]  # noqa: B023

    for errors in serve(model, work, ring_degree=2):
        for error, (_, _, words) in zip(errors, REFUSED, strict=True):
            assert isinstance(error, InputError), words
            assert words in str(error)
            assert "\n" not in str(error)


def test_padding_that_is_no_token_is_refused_where_rows_may_end_early(model):
    """transformers would fail in the middle, where it embeds it."""
    two = tokens(2, 20)

    def work(engine: Engine) -> tuple[str, Tensor]:
        set_fields(engine.model, {"pad_token_id": -1, "eos_token_id": 3})
        alone = engine.generate(two[:1], torch.ones_like(two[:1]), max_new_tokens=2)
        return str(outcome(lambda: engine.generate(two, torch.ones_like(two), max_new_tokens=2))), alone

    for refused, alone in serve(model, work, ring_degree=2):
        assert refused == (
            "pad_token_id=-1 of the checkpoint's generation_config.json is outside the vocabulary of 257, and rows "
            "that end early are filled with it; give a pad_token_id"
        )
        assert alone.shape == (1, 22)


@pytest.mark.parametrize(
    ("fields", "call", "words"),
    [
        ({"eos_token_id": 10**30}, {}, f"eos_token_id={10**30} of the checkpoint's generation_config.json must be"),
        ({"eos_token_id": [3, 10**30]}, {}, f"eos_token_id=[3, {10**30}] of the checkpoint's generation_config.json"),
        ({"pad_token_id": -(10**30)}, {}, f"pad_token_id=-{10**30} of the checkpoint's generation_config.json must"),
        ({}, {"suppress_tokens": [10**30]}, f"suppress_tokens=[{10**30}] must be a list of token ids"),
        ({"eos_token_id": 3}, {"pad_token_id": 5000}, "pad_token_id=5000 is outside the vocabulary of 257, and rows"),
        ({"eos_token_id": 5000}, {}, "pad_token_id=5000, the first of eos_token_id, is outside the vocabulary of 257"),
    ],
    ids=str,
)  # fmt: skip
def test_ids_that_no_vocabulary_has_are_named_with_their_source(model, fields, call, words):
    two = tokens(2, 20)

    def work(engine: Engine) -> Exception | None:
        set_fields(engine.model, {"pad_token_id": None} | fields)
        return outcome(lambda: engine.generate(two, torch.ones_like(two), max_new_tokens=2, **call))

    for error in serve(model, work, ring_degree=2):
        assert isinstance(error, InputError)
        assert str(error).startswith(words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "generation_config.json is not JSON: Expecting property name"),
        ("[1]", "generation_config.json must hold a JSON object, not [1]"),
        ('{"max_new_tokens": "8"}', "generation_config.json: max_new_tokens='8' must be a whole number of at least 1"),
        ('{"cache_implementation": "no such"}', "transformers cannot use the settings of"),
        ('{"streamer": 1}', "transformers cannot use the settings of"),
        (b"\xff\xfe", "generation_config.json is not JSON: "),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_and_not_passed_over(tmp_path, text, message):
    (tmp_path / "generation_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError) as error:
        read_generation_config(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_file_the_settings_are_the_models_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 5, "num_beams": 3}))
    found = read_generation_config(tmp_path)
    assert (found.eos_token_id, found.num_beams) == (5, 3)
