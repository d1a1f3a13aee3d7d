"""The documentation names what exists: files, folders, classes, functions, fields, options, and links between pages."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ds_ring", "benchmarks", "launch", "tests", "ds_configs", "docs")
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
EXPERIMENTS = sorted(ROOT.glob("docs/experiments/*.md"))
"""Their names are those of the time of writing; their links and records are not."""
OF_OTHERS = ("torch", "transformers", "deepspeed")
"""Packages whose names are theirs to keep."""
SECTIONS = {"ds_ring": "RingConfig", "workload": "WorkloadConfig", "parallel": "ParallelConfig"}
"""Of the configuration, by the classes that have their fields."""

QUOTED = re.compile(r"`([^`\n]+)`")
NAME = re.compile(r"[A-Za-z_]\w*")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
OPTION = re.compile(r"--[a-z][a-z-]*")
IN_FILE = re.compile(r"(.+\.py):([A-Za-z_][\w.]*)")
FILE = re.compile(r"[\w./*-]+\.(py|md|json|cu|cuh|toml|txt|png)|[\w./*-]*/")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@cache
def tree() -> tuple[str, ...]:
    """Every file from the root, and every folder with a slash after it."""
    found = [path for name in FOLDERS for path in (ROOT / name, *(ROOT / name).rglob("*"))]
    found += [path for path in ROOT.iterdir() if path.is_file()]
    kept = [path for path in found if "__pycache__" not in path.parts]
    return tuple(f"{path.relative_to(ROOT).as_posix()}{'/' if path.is_dir() else ''}" for path in kept)


def matching(name: str) -> list[str]:
    """What of the tree ``name`` is the end of; it may hold ``*``."""
    return [path for path in tree() if fnmatch(f"/{path}", f"*/{name}")]


@cache
def defined_in(file: str) -> frozenset[str]:
    """Functions, classes and values of a module, and ``Class.member`` for what a class has or assigns to itself."""
    found: set[str] = set()

    def collect(node: ast.AST, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = owner
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found.add(owner + child.name)
                if isinstance(child, ast.ClassDef):
                    inner = f"{owner}{child.name}."
            elif isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name) and child.value.id == "self":
                found.add(owner + child.attr)
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                found.add(owner + child.id)
            collect(child, inner)

    collect(ast.parse((ROOT / file).read_text()), "")
    return frozenset(found)


@cache
def modules() -> tuple[str, ...]:
    return tuple(path for path in tree() if path.endswith(".py") and not path.startswith("tests/"))


@cache
def words() -> frozenset[str]:
    """Every word of our sources, and of the records' fields."""
    kinds = (".py", ".cu", ".cuh", ".toml", ".json")
    texts = [path for path in tree() if path.endswith(kinds) and not path.startswith("tests/")]
    return frozenset(word for path in texts for word in NAME.findall((ROOT / path).read_text()))


def missing(quoted: str, page: str) -> str | None:
    """What of a quoted text does not exist; None: nothing, or it is no name."""
    if " " in quoted:  # a command or a formula; those of records are as they were given
        paths = [word.strip("\"'") for word in quoted.split() if word.startswith(tuple(f"{f}/" for f in FOLDERS))]
        return None if page == "performance.md" else next((path for path in paths if not matching(path)), None)
    if match := IN_FILE.fullmatch(quoted):
        files = matching(match[1])
        return None if len(files) == 1 and match[2] in defined_in(files[0]) else quoted
    if FILE.fullmatch(quoted):
        return None if matching(quoted) or quoted in records_to_be(page) else quoted
    if DOTTED.fullmatch(quoted):
        first, _, rest = quoted.partition(".")
        known = first in OF_OTHERS or any(is_defined(file, first, rest) for file in modules())
        return None if known else quoted
    if OPTION.fullmatch(quoted):
        return None if quoted[2:].replace("-", "_") in words() or any(quoted in text for text in scripts()) else quoted
    return quoted if NAME.fullmatch(quoted) and quoted not in words() else None


def is_defined(file: str, first: str, rest: str) -> bool:
    """Whether ``first.rest`` is a member of a class of this module, of the module itself, or a setting."""
    of_module = Path(file).stem == first and rest in defined_in(file)
    of_section = first in SECTIONS and f"{SECTIONS[first]}.{rest}" in defined_in(file)
    of_package = first == "ds_ring" and file == "ds_ring/__init__.py" and f'"{rest}"' in (ROOT / file).read_text()
    return of_module or of_section or of_package or f"{first}.{rest}" in defined_in(file)


@cache
def scripts() -> tuple[str, ...]:
    return tuple((ROOT / path).read_text() for path in modules())


def records_to_be(page: str) -> list[str]:
    """What the performance page says is not measured yet, or is where commands write."""
    names = re.findall(r'"file": "([^"]+)"', (ROOT / "benchmarks/page.json").read_text())
    return ["results/", *(f"benchmarks/results/{name}" for name in names)] if page == "performance.md" else []


def blocks_of_commands(text: str) -> str:
    """The lines of code blocks, fenced or indented."""
    fenced = "\n".join(re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    return fenced + "\n".join(re.findall(r"^ {4}.*$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    assert [name for quoted in QUOTED.findall(text) if (name := missing(quoted, page.name))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_its_commands_name_exists(page):
    named = re.findall(rf"(?<![\w/])(?:{'|'.join(FOLDERS)})/[\w./*-]*\w", blocks_of_commands(page.read_text()))
    assert [path for path in named if not matching(path) and not matching(f"{path}/")] == []


@pytest.mark.parametrize("page", [*PAGES, *EXPERIMENTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_its_links_lead_somewhere(page):
    assert [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", EXPERIMENTS, ids=lambda page: page.name)
def test_records_of_experiments_exist(page):
    named = [name for name in QUOTED.findall(page.read_text()) if re.fullmatch(r"[\w*]+\.json", name)]
    assert [name for name in named if not list(ROOT.glob(f"benchmarks/results/{name}"))] == []


def test_every_page_of_experiments_is_in_their_index():
    index = ROOT / "docs/experiments/README.md"
    assert set(LINK.findall(index.read_text())) >= {page.name for page in EXPERIMENTS if page != index}


@pytest.mark.parametrize(
    "quoted",
    [
        "attention/no_such_file.py", "no_such_file.py", "attention/ring.py:no_such_function", "config.py:RunConfig.no",
        "KVExchange.no_such_method", "workload.no_such_field", "no_such_word_anywhere", "no_such_folder/",
        "python launch/no_such_script.py --all", "--no-such-option",
        "__init__.py:importlib",  # of which there are several
    ],
)  # fmt: skip
def test_a_name_that_is_wrong_is_found(quoted):
    assert missing(quoted, "README.md") is not None
