"""Whose tokens a conversation's are, by templates that mark them and by those that do not."""

from itertools import pairwise

import pytest

from ds_ring.cli.conversations import conversation, next_targets
from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from ds_ring.errors import InputError

TURNS = [
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes\n"}, {"role": "user", "content": "so"},
    {"role": "assistant", "content": "no"},
]  # fmt: skip
PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] }}</s>\n{% endif %}{% endfor %}"
)
FORGETS = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}<{{ m['content'] }}>{% endif %}{% endfor %}"


def tokenizer(template):
    made = byte_tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by_text", "by_marks"])
def test_the_assistants_tokens_are_what_it_would_generate(template):
    ids, counted = conversation(tokenizer(template), TURNS)
    text = "<user>hi</s>\n<assistant>yes\n</s>\n<user>so</s>\n<assistant>no</s>\n"
    assert byte_tokenizer().decode(ids) == text
    said = ["".join(c for c, own in zip(part, flags, strict=True) if own) for part, flags in _turns(text, counted)]
    assert said == ["", "yes\n</s>", "", "no</s>"]


def _turns(text, counted):
    starts = [text.index(part) for part in ("<user>hi", "<assistant>yes", "<user>so", "<assistant>no")] + [len(text)]
    return [(text[a:b], counted[a:b]) for a, b in pairwise(starts)]


def test_a_token_is_scored_where_it_is_predicted():
    assert next_targets([5, 6, 7, 8], [True, False, True, True], -100) == [-100, 7, 8, -100]
    assert next_targets([5], [True], -100) == [-100]
    assert next_targets([], [], -100) == []


@pytest.mark.parametrize(
    ("template", "says"),
    [(None, "the tokenizer has no chat template for messages; give text or input_ids"),
     (FORGETS, "the chat template gives message 2 another text in the whole conversation than where it is the last"),
     ("{{ raise_exception('no\\nway') }}", "the tokenizer's chat template fails: TemplateError: no way"),
     ("{{ 1 / 0 }}", "the tokenizer's chat template fails: ZeroDivisionError: division by zero")],
)  # fmt: skip
def test_a_template_that_cannot_tell(template, says):
    with pytest.raises(InputError) as error:
        conversation(tokenizer(template), TURNS)
    assert str(error.value).startswith(says)


def test_a_conversation_without_an_assistant_has_nothing_to_score():
    ids, counted = conversation(tokenizer(PLAIN), TURNS[:1])
    assert len(ids) == len("<user>hi</s>\n")
    assert not any(counted)
