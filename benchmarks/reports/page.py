"""docs/performance.md, from benchmarks/page.json and the results files that it names.

The same files always give the same page, so a test can tell whether the page is up to date.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reports import pictures, summary
from benchmarks.reports.manifest import Page, Section, Source
from benchmarks.reports.record_tables import TABLES, Document, Rows, rows_of
from benchmarks.reports.tables import markdown_table
from benchmarks.reports.targets import HEADS, Result, evaluate, wanted
from ds_ring.errors import ConfigError
from ds_ring.utils.output_file import write_atomically
from ds_ring.utils.results import read_json

MANIFEST = Path("benchmarks/page.json")
RESULTS = Path("benchmarks/results")
PAGE = Path("docs/performance.md")
PICTURES = Path("docs/performance")
COMMAND = "python launch/performance.py"


@dataclass(frozen=True)
class RecordedSection:
    """A section and its recorded documents by file name, in the order of its sources."""

    section: Section
    documents: dict[str, Document]

    @property
    def rows(self) -> Rows:
        return [row for d in self.documents.values() for row in rows_of(d) if self.section.shows(row)]

    @property
    def is_measured(self) -> bool:
        return len(self.documents) >= self.section.needs

    @property
    def results(self) -> list[Result]:
        return [evaluate(target, self.rows) for target in self.section.targets]

    @property
    def notes(self) -> list[str]:
        """The notes that were written for these very records."""
        recorded = [(source, self.documents.get(source.file, {}).get("git")) for source in self.section.sources]
        return [f"`{source.file}`: {source.notes[commit]}" for source, commit in recorded if commit in source.notes]

    @property
    def missing(self) -> list[Source]:
        return [source for source in self.section.sources if source.file not in self.documents]


def read(root: Path) -> tuple[Page, list[RecordedSection]]:
    """The manifest, and the results that exist.

    Raises:
        ConfigError: an unusable manifest, or a results file that is not JSON.
    """
    page = Page.load(root / MANIFEST)
    return page, [RecordedSection(section, _recorded(root / RESULTS, section)) for section in page.sections]


def write(root: Path) -> dict[str, Any]:
    """Write the page and its pictures. Returns what is on it and what is not."""
    page, found = read(root)
    shown: set[str] = set()
    for one in found:
        if one.is_measured:
            pictures.draw(one.section, one.documents, one.rows, root / PICTURES)
            shown |= set(pictures.files(one.section, one.documents, one.rows))
    write_atomically(root / PAGE, text(page, found, root))
    for picture in (root / PICTURES).glob("*.png"):
        if picture.name not in shown:
            picture.unlink()  # not on the page any more
    target_results = [result for one in found if one.is_measured for result in one.results]
    return {
        "page": str(PAGE),
        "sections": [one.section.title for one in found if one.is_measured],
        "met": [result.target.what for result in target_results if result.met],
        "missed": [result.target.what for result in target_results if result.met is False],
        "not_measured": [source.file for one in found for source in one.missing],
    }


def text(page: Page, found: list[RecordedSection], root: Path) -> str:
    made_by = f"Made by `{COMMAND}` from the results files named below and `{MANIFEST}`; not to be edited by hand."
    measured = [one for one in found if one.is_measured]
    topics = list(dict.fromkeys(one.section.topic for one in measured if one.section.topic))
    lines = ["# Performance", "", *summary.lines(page.summary, root / RESULTS)]
    if topics:
        lines += [f"Details: {', '.join(f'[{topic}](#{_anchor(topic)})' for topic in topics)}.", ""]
    lines += ["## How to read this page", "", page.introduction, "", made_by, ""]
    topic = ""
    for one in measured:
        if one.section.topic not in ("", topic):
            lines += [f"## {one.section.topic}", ""]
        topic = one.section.topic
        lines += [*_section(one), ""]
    lines += [*_not_measured(found), ""]
    others = sorted(
        {file.name for file in (root / RESULTS).glob("*.json")} - {n for one in found for n in one.documents}
    )
    if others:
        lines += ["## Other records", "", "Results files that no section above is made from:", ""]
        lines += [f"- {_origin(name, read_json(root / RESULTS / name))}" for name in others]
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(one: RecordedSection) -> list[str]:
    section = one.section
    lines = [f"{'###' if section.topic else '##'} {section.title}", ""]
    for paragraph in [section.caption, *one.notes]:
        lines += [paragraph, ""] if paragraph else []
    lines += [*TABLES[section.kind](list(one.documents.values()), one.rows), ""]
    if section.targets:
        lines += [*markdown_table(HEADS, [result.cells() for result in one.results]), ""]
    for name in pictures.files(section, one.documents, one.rows):
        lines += [f"![{section.title}]({PICTURES.name}/{name})", ""]
    lines += ["From:", ""]
    return lines + [f"- {_origin(name, document)}" for name, document in one.documents.items()]


def _anchor(heading: str) -> str:
    """Where a link to a heading leads, as GitHub names it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _not_measured(found: list[RecordedSection]) -> list[str]:
    lines = ["## Not measured yet", ""]
    for one in found:
        targets = () if one.is_measured else one.section.targets
        for source in one.missing:
            command = f"`{source.command}`" if source.command else "no command makes it yet"
            lines.append(f"- {one.section.title} (`{RESULTS}/{source.file}`): {command}")
        if targets and one.missing:
            lines.append(f"  Wanted: {'; '.join(f'{target.what} {wanted(target)}' for target in targets)}.")
    return lines if len(lines) > 2 else []


def _origin(name: str, document: Document) -> str:
    """The file, its command, the devices, their clock and power, the commit, the day and the versions."""
    rows = rows_of(document)
    devices = dict.fromkeys(str(d) for d in [document.get("device"), *(r.get("device") for r in rows)] if d)
    counts = sorted({r["gpus"] for r in rows if "gpus" in r})
    where = ", ".join(devices) + (f" ({' and '.join(map(str, counts))} of a host)" if counts and counts != [1] else "")
    parts = [where, _range(rows, "sm_clock_mhz", "MHz"), _range(rows, "power_w", "W"), f"commit {document['git']}"]
    versions = ", ".join(f"{p} {document['versions'][p]}" for p in ("torch", "transformers", "deepspeed"))
    said = "; ".join(part for part in [*parts, str(document["date"])[:10], versions] if part)
    return f"`{RESULTS}/{name}`: `{document['command']}`; {said}"


def _range(rows: Rows, figure: str, unit: str) -> str:
    values = [r[figure] for r in rows if r.get(figure)]
    if not values:
        return ""
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _recorded(folder: Path, section: Section) -> dict[str, Document]:
    documents = {}
    for source in section.sources:
        file = folder / source.file
        if file.is_file():
            try:
                documents[source.file] = read_json(file)
            except ValueError as error:
                raise ConfigError(f"{file} is not JSON: {error}") from None
    return documents
