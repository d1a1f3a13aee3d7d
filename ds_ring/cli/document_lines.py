"""JSON Lines of documents: one object a line, of which everything is checked that shows without a model.

    {"id": "a", "text": "…"}
    {"id": "b", "input_ids": [1, 2, 3], "target_ids": [2, 3, -100]}
    {"id": "c", "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

``id`` is text or a whole number; without one it is the document's index. ``target_ids`` may be left out: then each
token's target is the next one. It may hold a list of several targets for each token, equally many.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from ds_ring.errors import InputError
from ds_ring.utils.unscored import UNSCORED

T = TypeVar("T")
S = TypeVar("S")

FORMS = ("text", "input_ids", "messages")
NAMED = 8
"""Bad lines that are listed by their numbers."""


@dataclass(frozen=True)
class Line:
    """A document as its line has it.

    Attributes:
        number: of the line, from 1.
        index: of the document, from 0; empty lines are none.
        form: one of ``FORMS``, and ``content`` what stands there.
    """

    number: int
    index: int
    id: str | int
    form: str
    content: Any
    target_ids: Any = None


def read_lines(path: str) -> list[Line]:
    """
    Raises:
        InputError: no regular file, no document in it, or lines that are none, by their numbers.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"cannot read {path}: every rank reads --documents, so it must be a regular file")
    try:
        with open(path, "rb") as file:
            numbered = [(number, data) for number, data in enumerate(file, 1) if data.strip()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not numbered:
        raise InputError(f"{path} holds no document")
    return of_lines(path, enumerate(numbered), lambda given: _line(given[0], *given[1]), lambda given: given[1][0])


def of_lines(path: str, lines: Iterable[T], make: Callable[[T], S], number: Callable[[T], int]) -> list[S]:
    """``make`` of each line; an InputError of it is raised for the first bad line, with the numbers of all."""
    made, bad = list[S](), list[tuple[int, str]]()
    for line in lines:
        try:
            made.append(make(line))
        except InputError as error:
            bad.append((number(line), str(error)))
    if bad:
        (first, why), *others = bad
        listed = ", ".join(str(other) for other, _ in others[:NAMED]) + (", …" if len(others) > NAMED else "")
        more = f"; {len(others)} more bad lines: {listed}" if others else ""
        raise InputError(f"{path} line {first}: {why}{more}")
    return made


def _line(index: int, number: int, data: bytes) -> Line:
    try:
        found = json.loads(data.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text: {error.reason} at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg} at character {error.colno}") from None
    except (RecursionError, ValueError) as error:  # too deep, or a number of too many digits
        raise InputError(f"not JSON that can be read: {error}") from None
    if not isinstance(found, dict):
        raise InputError("not a JSON object")
    if unknown := [name for name in found if name not in ("id", "target_ids", *FORMS)]:
        raise InputError(f"unknown field {unknown[0]!r}; known are id, target_ids, {', '.join(FORMS)}")
    forms = [form for form in FORMS if form in found]
    if len(forms) != 1:
        raise InputError(f"exactly one of {', '.join(FORMS)} is needed, not {len(forms)} of them")
    name = found.get("id", index)
    if not isinstance(name, str) and type(name) is not int:
        raise InputError(f"id must be text or a whole number, not {_kind(name)}")
    content, target_ids = found[forms[0]], found.get("target_ids")
    _CHECKS[forms[0]](content)
    if "target_ids" in found:
        if forms[0] != "input_ids":
            raise InputError(f"target_ids go with input_ids, not with {forms[0]}")
        _check_targets(target_ids, len(content))
    return Line(number, index, name, forms[0], content, target_ids)


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise InputError(f"text must be a string, not {_kind(text)}")


def _check_ids(ids: Any) -> None:
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise InputError("input_ids must be a list of whole numbers of at least 0")


def _check_messages(messages: Any) -> None:
    usable = isinstance(messages, list) and messages
    if not usable or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise InputError("messages must be a list of objects, each with a role")


def _check_targets(targets: Any, tokens: int) -> None:
    if not isinstance(targets, list) or len(targets) != tokens:
        given = f"{len(targets)} of them" if isinstance(targets, list) else _kind(targets)
        raise InputError(f"target_ids must be a list of {tokens}, as many as input_ids, not {given}")
    if all(isinstance(each, list) for each in targets) and targets:
        if len({len(each) for each in targets}) > 1 or not targets[0]:
            raise InputError("target_ids must have equally many targets for each token, at least one")
        flat = [target for each in targets for target in each]
    else:
        flat = targets
    if not all(type(target) is int and (target >= 0 or target == UNSCORED) for target in flat):
        raise InputError(f"target_ids must be token ids, or {UNSCORED} at tokens that are left out")


_CHECKS: dict[str, Callable[[Any], None]] = {
    "text": _check_text, "input_ids": _check_ids, "messages": _check_messages,
}  # fmt: skip


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number" if type(value) is int else f"{value}")
