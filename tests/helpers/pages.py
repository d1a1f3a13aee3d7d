"""A performance page of given sections and records, and the tables of a Markdown text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.reports import page

PROVENANCE = {
    "command": "made.py --by hand", "git": "abc123", "date": "2001-02-03T04:05:06+00:00",
    "versions": {"torch": "2", "transformers": "5", "deepspeed": "1"},
}  # fmt: skip


def make_page(root: Path, sections: list[dict[str, Any]], **records: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(text, summary) of the page of a repository at ``root`` with these sections and records."""
    for name, document in records.items():
        file = root / page.RESULTS / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(PROVENANCE | document))
    manifest = root / page.MANIFEST
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"introduction": "By hand.", "sections": sections}))
    summary = page.write(root)
    assert (root / page.PAGE).read_text() == page.text(*page.read(root), root)
    return (root / page.PAGE).read_text(), summary


def section(kind: str, *names: str, **more: Any) -> dict[str, Any]:
    sources = [{"file": f"{name}.json", "command": f"make {name}"} for name in names]
    return {"title": f"About {kind}", "kind": kind, "sources": sources} | more


def tables(text: str) -> list[list[dict[str, str]]]:
    """Every Markdown table of a text, as rows by the heads of their columns."""
    found: list[list[dict[str, str]]] = []
    heads: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            heads = None
            continue
        cells = [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split(" |")]
        if heads is None:
            heads = cells
            found.append([])
        elif not set(cells[0]) <= {"-"} or not cells[0]:
            found[-1].append(dict(zip(heads, cells, strict=True)))
    return found
