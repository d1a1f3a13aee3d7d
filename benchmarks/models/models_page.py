"""docs/models.md: the results of ``check_models`` in one or several layouts, with a line for each model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from benchmarks.reports.tables import markdown_table
from ds_ring.errors import InputError

Document = dict[str, Any]
Found = dict[str, dict[str, Any]]
"""The rows of one model, by layout."""

SECTIONS = {
    "works": "The same logits and tokens as the unsharded model, in every layout.",
    "works in some layouts": "The others refuse it by name.",
    "refused": "Named in an error before anything is computed wrongly.",
    "differs": "Wrong: a fault of ours.",
    "failed": "An error that is not a refusal.",
    "not tried": "transformers itself makes no small model of it this way.",
}


def text(documents: Sequence[Document]) -> str:
    """The page. Raises InputError: documents of unlike lengths, new tokens or releases of transformers."""
    first = documents[0]
    for document in documents:
        for what in ("length", "new_tokens"):
            if document[what] != first[what]:
                raise InputError(f"{document['layout']} and {first['layout']} differ in {what}: make both again")
        if document["versions"]["transformers"] != first["versions"]["transformers"]:
            raise InputError(f"{document['layout']} and {first['layout']} are of other releases of transformers")
    models: dict[tuple[str, str], Found] = {}
    for document in documents:
        for row in document["rows"]:
            name = " ".join([row["model_type"], *([f"({row['rope']})"] if "rope" in row else [])])
            models.setdefault((name, row["class"]), {})[document["layout"]] = row
    layouts = ", ".join(dict.fromkeys(document["layout"] for document in documents))
    lines = [
        "# transformers' causal LMs, sharded",
        "",
        f"Each in small with random weights, fp32, on {layouts}, against the unsharded model: logits and scores of "
        f"{first['length']} tokens and of texts on both sides of every length at which the model changes (windows, "
        f"rotary frequencies), alone and in one batch; {first['new_tokens']} greedy tokens, and a few after a prompt "
        "in chunks and in a second turn. Rotary models also with LongRoPE and dynamic NTK scaling, whose frequencies "
        "depend on the length.",
    ]
    for section, meaning in SECTIONS.items():
        cells = [[*name, _last(section, found)] for name, found in models.items() if _section(found) == section]
        if cells:
            last = "max error" if section in ("works", "differs") else "why"
            lines += [
                "",
                f"## {section}: {len(cells)}",
                "",
                meaning,
                "",
                *markdown_table(["type", "class", last], cells),
            ]
    made = dict.fromkeys(
        f"- `{_command(document)}` at {document['git']}, {document['date'][:10]}; "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        for document in documents
    )
    return "\n".join([*lines, "", *made, ""])


def _command(document: Document) -> str:
    """What made it, without the list of types where it is one of several parts."""
    return re.sub(r" --types( \w[\w-]*)+|--local_rank=\d+ ", "", document["command"])


def _section(found: Found) -> str:
    outcomes = {row["outcome"] for row in found.values()}
    wrong = next((outcome for outcome in ("differs", "failed") if outcome in outcomes), None)
    if wrong or len(outcomes) == 1:
        return wrong or outcomes.pop()
    return "works in some layouts"


def _last(section: str, found: Found) -> str:
    if section in ("works", "differs"):
        worst = max(row.get("max_rel_error", 0.0) for row in found.values())
        return f"{worst:.1e} {_details(found)}".strip()
    if section == "works in some layouts":
        working = [layout for layout, row in found.items() if row["outcome"] == "works"]
        return f"{', '.join(working)}. {_details(found)}"
    if section == "failed":
        return _details(found)
    return next(iter(found.values()))["detail"]


def _details(found: Found) -> str:
    """The details of each layout. Layouts with the same details are listed together."""
    by_detail: dict[str, list[str]] = {}
    for layout, row in found.items():
        if row["detail"]:
            by_detail.setdefault(row["detail"], []).append(layout)
    return "; ".join(f"{', '.join(layouts)}: {detail}" for detail, layouts in by_detail.items())
