"""``benchmarks/page.json``: which results file feeds which section of the page, and what was wanted of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ds_ring.errors import ConfigError

Kind = Literal[
    "forward", "products", "transfers", "attention", "profile", "generation", "comparison", "latency", "longest",
    "scaling",
]  # fmt: skip
Selector = dict[str, str | int | bool]
"""Fields of a row and their values; a row is meant when it has them all."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Part):
    """A file of benchmarks/results/, and the command that makes it."""

    file: str
    command: str | None = Field(description="None: there is no such command yet")
    notes: dict[str, str] = Field(
        default_factory=dict, description="what to know of a record, by the commit it was made at; gone with the record"
    )


class Bar(_Part):
    """What was wanted of a figure: of the worst row that ``of`` selects, if several."""

    what: str
    figure: str
    of: Selector
    over: Selector | None = Field(None, description="the figure is a ratio to that of these rows")
    over_figure: str | None = Field(None, description="the ratio is to another figure, of ``over`` or of the same row")
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_side(self) -> Bar:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give either at_least or at_most")
        return self


class Section(_Part):
    title: str
    kind: Kind
    caption: str = Field("", description="one sentence, whatever is recorded")
    sources: tuple[Source, ...] = Field(min_length=1)
    needs: int = Field(1, ge=1, description="how many of the sources make a section")
    rows: dict[str, list[str | int]] = Field(default_factory=dict, description="rows to show, by a field's values; all")
    bars: tuple[Bar, ...] = ()

    def shows(self, row: dict[str, Any]) -> bool:
        return all(row.get(name) in values for name, values in self.rows.items())


class Preparation(_Part):
    """A file or folder that must be there before commands with one of the words ``wanted_by`` in them are run."""

    makes: str
    command: str
    wanted_by: tuple[str, ...]


class Page(_Part):
    introduction: str
    preparations: tuple[Preparation, ...] = ()
    sections: tuple[Section, ...]

    @classmethod
    def load(cls, file: Path) -> Page:
        """Raises ConfigError: a file that cannot be read, an unknown key or a value of the wrong kind."""
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
