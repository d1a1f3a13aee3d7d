"""Our model of lm_eval beside its own for transformers: the same requests get the same answers, on every rank."""

from functools import cache

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from ds_ring.cli.lm_eval_model import LoadedOnFirstUse, RingLM, scored
from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from ds_ring.errors import InputError
from tests.helpers.mocked_world import outcome, serve
from tests.helpers.tiny_models import build, llama_gqa

LAYOUTS = {"ring2": {"ring_degree": 2}, "dp2": {"dp_size": 2}, "pp2": {"pp_size": 2}}
LONGEST = 48
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def model():
    return build(llama_gqa(vocab_size=300, num_hidden_layers=2))


def tokenizer():
    found = byte_tokenizer()
    found.chat_template = TEMPLATE
    return found


def instances(kind, arguments):
    return [Instance(kind, {}, words, number, ("task", number, 1)) for number, words in enumerate(arguments)]


PAIRS = [
    ("A question:", " yes"), ("A question:", " no"), ("A question:", " yet"),  # last tokens differ
    ("A question: y", "es"), ("A question:", " yes"),  # of the same text, and twice the same
    ("", "without context"), ("trailing space ", "moves"), ("x", "y"),
    ("cut on the left, since there are so many words in front of it: ", "end"),
]  # fmt: skip
TEXTS = ["a", "short text", "one that is longer than the model can take: " * 3]
PROMPTS = ["To be or", "not", "Tell me why ever", "cut on the left as well: " * 4]


@cache
def greedy_windows():
    """Token ids of contexts with what greedy decoding takes behind them; of the last one the last token is another."""
    found = []
    for prompt in PROMPTS[:3]:
        context = tokenizer()(prompt, return_tensors="pt")["input_ids"]
        whole = model().generate(context, max_new_tokens=5, do_sample=False)
        found.append((None, context[0].tolist(), whole[0, context.shape[1] :].tolist()))
    found[2][2][-1] += 1 if found[2][2][-1] < 299 else -1
    return found


def requests(lm):
    """All kinds, with what comes of a chat template."""
    chat = lm.apply_chat_template([{"role": "user", "content": "Hello"}])
    pairs = [*PAIRS, (chat, " world")]
    until = {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False}
    generations = [*((prompt, until) for prompt in [*PROMPTS, chat]), (PROMPTS[0], {"until": [], "max_gen_toks": 7})]
    return [
        [*lm.loglikelihood(instances("loglikelihood", pairs)), *lm._loglikelihood_tokens(greedy_windows())],
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in TEXTS])),
        lm.generate_until(instances("generate_until", generations)),
        chat,
    ]


@cache
def wanted():
    """Without lm_eval's cache of logits, which looks at wrong tokens where continuations of a text differ in length,
    and with a softmax in fp64, since PyTorch's in fp32 is exact to five digits only."""
    options = {"tokenizer": tokenizer(), "max_length": LONGEST, "softmax_dtype": "float64", "logits_cache": False}
    return requests(HFLM(model(), device="cpu", **options))


def made(engine, batch_size):
    lazy = LoadedOnFirstUse(model().config, lambda: engine)
    return RingLM(lazy, tokenizer=tokenizer(), max_length=LONGEST, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_answers_are_those_of_the_back_end_for_transformers(layout, batch_size):
    pairs, rolling, texts, chat = wanted()
    assert [greedy for _, greedy in pairs[-3:]] == [True, True, False]
    for found in serve(
        model(), lambda engine: requests(made(engine, batch_size)), batch_size=2, micro_batch_size=2, **layout
    ):
        for (log_likelihood, greedy), (want, want_greedy) in zip(found[0], pairs, strict=True):
            assert log_likelihood == pytest.approx(want, abs=1e-4)
            assert greedy == want_greedy
        assert found[1] == pytest.approx(rolling, rel=1e-5)
        assert found[2:] == [texts, chat]


def test_a_text_runs_once_for_all_that_is_asked_of_it():
    found = scored([(None, [1, 2], [3, 4]), (None, [1, 2, 3], [5]), (None, [1], [2]), (None, [1, 2], [3, 4])], 9)
    assert [text.ids for text in found] == [(1, 2, 3), (1,)]
    assert found[0].continuations == {(3, 4): [0, 3], (5,): [1]}
    assert found[0].targets(3).tolist() == [[-100] * 3, [3, -100, -100], [4, 5, -100]]


def test_requests_that_are_too_long_lose_their_beginning():
    (found,) = scored([(None, [1, 2, 3, 4], [5, 6])], 3)
    assert found.ids == (3, 4, 5)
    assert found.targets(1).tolist() == [[-100], [5], [6]]


@pytest.mark.parametrize(
    ("context", "continuation", "text"),
    [
        ([1], [], "request 0 of the tasks has 1 tokens of context and 0 of continuation"),
        ([], [1], "request 0 of the tasks has 0 tokens of context and 1 of continuation"),
        ([1], [2, 3, 4], "1 tokens of context and 3 of continuation; .* at most max_length=2 of the latter"),
    ],
)
def test_requests_that_no_model_could_answer_are_refused(context, continuation, text):
    with pytest.raises(InputError, match=text):
        scored([(None, context, continuation)], 2)


def test_generations_that_leave_no_room_for_a_prompt_are_refused_by_all_ranks_before_weights_load():
    def work(engine):
        lazy = LoadedOnFirstUse(model().config, lambda: pytest.fail("loaded"))
        lm = RingLM(lazy, tokenizer=tokenizer(), max_length=LONGEST)
        return outcome(lambda: lm.generate_until(instances("generate_until", [("a", {"max_gen_toks": LONGEST})])))

    for error in serve(model(), work, ring_degree=2):
        assert isinstance(error, InputError)
        assert "task task asks for max_gen_toks=48, which leaves a prompt no token of max_length=48" in str(error)
