"""The generate command around the engine: prompts, options, completions, times."""

import json

import pytest
import torch

from benchmarks.layouts import decode_floor
from benchmarks.layouts.held_memory import growth, recorded_passes
from ds_ring import api
from ds_ring.cli import documents, generation_clock, prompts
from ds_ring.cli import generate as generate_command
from ds_ring.cli import options as cli_options
from ds_ring.cli.generate import planned_by_default
from ds_ring.cli.sampling import Sampling, check
from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from ds_ring.cli.timed_generation import generate, summary
from ds_ring.config import RunConfig
from ds_ring.errors import CheckpointError, InputError, UserError
from tests.helpers.launching import save
from tests.helpers.mocked_world import serve
from tests.helpers.tiny_models import build, llama_gqa


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("llama"), llama_gqa(vocab_size=257))


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_prompt_is_refused_before_ranks_start(text):
    args = generate_command.make_parser().parse_args(["--prompt", "x", text, "--prompt-file", "/dev/stdin"])
    with pytest.raises(InputError, match="prompt 2 of 3 is empty"):
        generate_command.check(args)


def test_prompts_come_before_files_and_are_read_whole(checkpoint, tmp_path, monkeypatch):
    def begins_with_a_token(text, **options):
        return {"input_ids": [1, *text.encode()]}

    file = tmp_path / "a.txt"
    file.write_text("from a file\n")
    config = RunConfig.load({"dtype": "fp32"}, model=str(checkpoint))
    tokenizer, found = prompts.read(config, ["first", "second one"], [str(file)], 8)
    assert [tokenizer.decode(tokens) for tokens in found] == ["first", "second one", "from a file\n"]
    with pytest.raises(InputError, match="no prompt: give --prompt TEXT… or --prompt-file FILE…"):
        prompts.read(config, [], [], 8)
    with pytest.raises(InputError, match="prompt 2 of 2 is empty"):
        prompts.read(config, ["x", ""], [], 8)
    nowhere = RunConfig.load(config, model=str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="none is not a checkpoint directory"):
        prompts.read(nowhere, ["x"], [], 8)
    with pytest.raises(CheckpointError, match="none is not a checkpoint directory"):
        documents.read_files(nowhere, [str(file)])
    begins_with_a_token.chat_template = None
    monkeypatch.setattr(prompts, "load_tokenizer", lambda checkpoint: begins_with_a_token)
    with pytest.raises(InputError, match="prompt 2 of 3 is empty"):
        prompts.read(config, ["x", "", "y"], [], 8)
    with pytest.raises(InputError, match="cannot read"):
        prompts.read(config, [], [str(tmp_path / "none.txt")], 8)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def instruct(tmp_path):
    """A checkpoint whose tokenizer has a chat template."""
    folder = save(tmp_path / "instruct", llama_gqa(vocab_size=257))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return RunConfig.load({"dtype": "fp32"}, model=str(folder))


def test_a_prompt_is_a_users_message_in_the_chat_template(instruct):
    tokenizer, (tokens,) = prompts.read(instruct, ["a question"], [], 8)
    assert tokenizer.decode(tokens) == "<user>a question</><a>"
    _, (raw,) = prompts.read(instruct, ["a question"], [], 8, raw=True)
    assert tokenizer.decode(raw) == "a question"


def test_a_chat_template_that_fails_is_an_error_of_the_users(instruct):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only two turns') }}"
    tokenizer.save_pretrained(instruct.checkpoint)
    with pytest.raises(InputError, match=r"chat template fails: .*only two turns; --raw leaves it out"):
        prompts.read(instruct, ["a question"], [], 8)


def test_a_layout_is_planned_where_several_ranks_are_given_no_degree(monkeypatch):
    assert not planned_by_default(RunConfig.load({})).parallel.auto
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert planned_by_default(RunConfig.load({})).parallel.auto
    for degrees in ({"ring_degree": 2}, {"dp_size": 1}, {"tp_size": 2}, {"auto": False}):
        assert not planned_by_default(RunConfig.load({}, **degrees)).parallel.auto


def test_a_layout_is_planned_for_the_prompts_unless_sizes_are_given(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    three = [[1] * 90, [1] * 7, [1] * 30]
    auto = RunConfig.load({"ds_ring": {"parallel": "auto", "workload": {"prefill_chunk": 16}}})
    work = prompts.sized(auto, three, 10).workload
    assert (work.batch_size, work.max_length, work.prefill_chunk) == (3, 100, 16)
    given = RunConfig.load({"ds_ring": {"parallel": "auto"}}, max_length=2000)
    work = prompts.sized(given, three, 10).workload
    assert (work.batch_size, work.max_length) == (3, 2000)
    assert prompts.sized(RunConfig.load({}), three, 10).workload.batch_size == 1
    work = prompts.sized(planned_by_default(RunConfig.load({}, batch_size=2)), three, 10).workload
    assert (work.batch_size, work.max_length) == (2, 100)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(top_p=0.5), "top_p=0.5 counts with a temperature alone: temperature=0 takes the likeliest token"),
        (Sampling(top_k=3, seed=1), "give a temperature, or leave top_k out"),
    ],
)
def test_options_that_contradict_each_other_are_refused(sampling, words):
    with pytest.raises(InputError, match=words):
        check(sampling)


def test_a_seed_does_no_harm_without_a_temperature():
    check(Sampling(seed=1))
    check(Sampling(temperature=0.7, top_p=0.5, top_k=3, seed=1))


def test_memory_is_recorded_after_few_of_many_passes():
    assert recorded_passes(1) == {1}
    assert recorded_passes(1000) == {1, 10, 100, 1000}
    assert recorded_passes(2500) == {1, 10, 100, 1000, 2500}


def test_growth_leaves_out_what_first_passes_cost():
    assert growth({"1": 2.0}) == 1
    assert growth({"1": 2.0, "7": 3.0}) == 1.5
    assert growth({"1": 2.0, "10": 4.0, "100": 4.0, "250": 5.0}) == 1.25


def test_prompts_are_padded_at_their_beginnings():
    ids, mask = prompts.left_padded([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    "layout",
    [{"dp_size": 2}, {"ring_degree": 2}, {"pp_size": 2}, {"tp_size": 3}, {"tp_size": 3, "pp_size": 2}],
    ids=str,
)
def test_a_completion_ends_with_the_token_that_ends_it(layout):
    model, prompt = build(llama_gqa(vocab_size=257)), [1, 2, 3]
    with torch.no_grad():
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        text = model.generate(torch.tensor([prompt]), **options)[0, 3:].tolist()
    end = next(t for i, t in enumerate(text) if i > 1 and t not in text[:i])
    model.generation_config.update(eos_token_id=end, num_beams=2)
    said = []

    def work(engine):
        return generate(
            engine, byte_tokenizer(), [prompt], max_new_tokens=8, sampling=Sampling(), say=said.append, stream=False
        )

    for rank, found in enumerate(serve(model, work, batch_size=2, **layout)):
        (completion,) = found["completions"]
        assert completion["prompt_tokens"] == 3
        assert completion["token_ids"] == text[: text.index(end) + 1]
        if rank == 0:
            steps = len(completion["token_ids"])
            total_s = (found["ttft_ms"] + (steps - 1) * found["decode_tpot_ms"]) / 1e3
            assert found["tokens_per_second"] == pytest.approx(steps / total_s)
            assert found["ttft_ms"] > 0
        slots = -(-(len(prompt) + 8) // layout.get("ring_degree", 1))
        layers, heads = -(-3 // layout.get("pp_size", 1)), 3 // layout.get("tp_size", 1)
        at_least = slots * layers * 2 * heads * 8 * 4  # keys and values, their size, fp32
        assert at_least <= found["cache_gib_per_rank"] * 2**30 < 1.2 * at_least
    assert sum("tok/s" in text for text in said) == 1


@pytest.mark.parametrize("layout", [{}, {"ring_degree": 2}, {"pp_size": 2}], ids=str)
def test_prompts_in_chunks_report_their_progress(layout, monkeypatch):
    monkeypatch.setattr(generation_clock, "SAY_EVERY_S", 0.0)
    model, two, said = build(llama_gqa(vocab_size=257)), [[1] * 50, [2] * 20], []

    def work(engine):
        return generate(
            engine, byte_tokenizer(), two, max_new_tokens=1, sampling=Sampling(), say=said.append, stream=False
        )

    found = serve(model, work, batch_size=2, micro_batch_size=2, prefill_chunk=16, **layout)
    assert [text.partition(" tokens,")[0] for text in said if "tokens," in text] == [
        "prefill: 32 of 70", "prefill: 52 of 70", "prefill: 68 of 70",
    ]  # fmt: skip
    assert summary(found[0] | {"ttft_ms": 1234.4, "tokens_per_second": 9.87, "cache_gib_per_rank": 1.5}) == (
        "first token after 1,234 ms, 9.9 tok/s, cache 1.500 GiB a rank"
    )
    assert "2.35 ms a token" in summary(found[0] | {"decode_tpot_ms": 2.345678})
    monkeypatch.setattr(generation_clock, "SAY_EVERY_S", 60.0)
    said.clear()
    serve(model, work, batch_size=2, prefill_chunk=16, **layout)
    assert not [text for text in said if "tokens," in text]


@pytest.mark.parametrize("tied", [False, True], ids=["own_head", "tied_head"])
def test_the_floor_of_a_step_is_what_all_stages_read_one_after_the_other(tied, monkeypatch):
    monkeypatch.setattr(decode_floor, "copy_rate", lambda device: 1e9)
    model = build(llama_gqa(vocab_size=257, tie_word_embeddings=tied))

    def work(engine):
        floor_s = decode_floor.step_floor_s(engine, 1000 * len(engine.runner.layers))
        return floor_s, decode_floor.share_of_weights(engine)

    ((alone_s, weights),) = serve(model, work)
    embedding = 257 * 72 * 4
    assert weights == sum(p.nbytes for p in model.parameters()) - (0 if tied else embedding)
    assert alone_s == pytest.approx((weights + 3000) / 1e9)
    for found_s, _ in serve(model, work, pp_size=2):
        assert found_s == pytest.approx(alone_s)
    for found_s, _ in serve(model, work, ring_degree=2):
        assert found_s == pytest.approx((weights / 2 + 3000) / 1e9)
    split = serve(model, work, tp_size=3, pp_size=2)
    slowest = [max(share for _, share in split[stage : stage + 3]) for stage in (0, 3)]
    for found_s, _ in split:
        assert found_s == pytest.approx((sum(slowest) + 3000) / 1e9)
        assert weights / 3 < sum(slowest) < weights  # AutoTP cuts unevenly


def ask(checkpoint, monkeypatch, *options):
    """The command up to the point where weights would load; what it would ask of the engine then."""
    monkeypatch.setattr(api, "from_pretrained", lambda **options: pytest.fail("weights would load"))
    parser = cli_options.run_parser("", cli_options.USUAL)
    generate_command.add_options(parser)
    generate_command.work(parser.parse_args(["--model", str(checkpoint), "--prompt", "x", *options]))


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({"guidance_scale": 1.5}, (), "generate does not serve guidance_scale=1.5 of the checkpoint's generation_conf"),
        (
            {"eos_token_id": "2"},
            (),
            "eos_token_id='2' of the checkpoint's generation_config.json must be a token id or",
        ),
        ({"repetition_penalty": -1}, (), "repetition_penalty=-1 of the checkpoint's generation_config.json must be"),
        (
            {"typical_p": 0.0},
            ("--temperature", "1"),
            "transformers refuses the options of generate: `typical_p` has",
        ),
        ("{", (), "generation_config.json is not JSON: Expecting property name"),
    ],
    ids=str,
)
def test_what_a_checkpoint_asks_for_and_is_not_served_is_refused_before_weights_load(
    tmp_path, monkeypatch, settings, options, words
):
    folder = save(tmp_path / "model", llama_gqa(vocab_size=257))
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UserError) as error:
        ask(folder, monkeypatch, *options)
    assert words in str(error.value)


@pytest.mark.parametrize("settings", [{"num_beams": 4}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_what_the_command_decides_itself_or_no_token_depends_on_is_no_reason_to_refuse(tmp_path, monkeypatch, settings):
    folder = save(tmp_path / "model", llama_gqa(vocab_size=257))
    (folder / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(pytest.fail.Exception, match="weights would load"):
        ask(folder, monkeypatch)


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({"num_beams": 4}, (), "num_beams=4: this command decodes with num_beams=1"),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "num_beams": 1},
            (),
            "do_sample=True, temperature=0.6, top_p=0.9: this command decodes with do_sample=False",
        ),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            ("--temperature", "0.7", "--top-p", "0.9"),
            "temperature=0.6: this command decodes with temperature=0.7",
        ),
        ({"do_sample": False, "temperature": 0.6}, (), None),
        ({"do_sample": True, "temperature": 0.6}, ("--temperature", "0.6"), None),
    ],
    ids=str,
)
def test_what_the_command_decides_otherwise_than_the_checkpoint_is_said(
    tmp_path, monkeypatch, caplog, settings, options, words
):
    folder = save(tmp_path / "model", llama_gqa(vocab_size=257))
    (folder / "generation_config.json").write_text(json.dumps(settings))
    caplog.set_level("INFO", "ds_ring")
    with pytest.raises(pytest.fail.Exception, match="weights would load"):
        ask(folder, monkeypatch, *options)
    said = [line for line in caplog.messages if "generation_config.json asks" in line]
    assert said == ([] if words is None else [f"generation_config.json asks for {words}"])


def test_more_tokens_than_memory_are_refused_before_weights_load(tmp_path, monkeypatch):
    folder = save(tmp_path / "model", llama_gqa(vocab_size=257))
    with pytest.raises(InputError) as error:
        ask(folder, monkeypatch, "--max-new-tokens", str(10**12))
    assert " + max_new_tokens=1000000000000 = 10000000000" in str(error.value)
    assert "GiB of cache on a rank, and it has " in str(error.value)
    assert str(error.value).endswith("give fewer or shorter rows, or share them among more ranks")


def test_a_stop_string_of_the_checkpoint_ends_a_completion():
    model, tokenizer, prompt = build(llama_gqa(vocab_size=257)), byte_tokenizer(), [1, 2, 3]
    sampling = Sampling()

    def work(engine):
        return generate(
            engine, tokenizer, [prompt, prompt[:2]], max_new_tokens=8, sampling=sampling, say=lambda _: None,
            stream=False,
        )  # fmt: skip

    model.generation_config.update(eos_token_id=None)
    first, second = [c["token_ids"] for c in serve(model, work)[0]["completions"]]
    characters = [tokenizer.decode([token]) for token in first]
    at = next(i for i, c in enumerate(characters[:-1]) if c.isascii() and first[i] not in [*first[:i], *second])
    model.generation_config.stop_strings = [characters[at]]
    for found in serve(model, work, ring_degree=2, batch_size=2):
        assert [c["token_ids"] for c in found["completions"]] == [first[: at + 1], second]
