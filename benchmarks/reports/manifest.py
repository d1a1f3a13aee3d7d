"""``benchmarks/page.json``: the sections of the performance page, their results files, and targets for the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ds_ring.errors import ConfigError

Kind = Literal[
    "forward", "products", "transfers", "attention", "profile", "generation", "comparison", "latency", "longest",
    "scaling", "layer_fusion", "checkpoint", "planner",
]  # fmt: skip
SummaryKind = Literal["throughput", "one_sequence", "implementations"]
Selector = dict[str, str | int | bool]
"""Fields of a row and their values. It selects the rows that have all of them."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """A file of benchmarks/results/, and the command that makes it."""

    file: str
    command: str | None = Field(description="None: no command makes it, or none any more")
    notes: dict[str, str] = Field(
        default_factory=dict, description="remarks on a record, by the commit that made it; a new record loses them"
    )


class Target(_Strict):
    """A target for a figure. Where ``of`` selects several rows, the worst counts."""

    what: str
    figure: str
    of: Selector
    over: Selector | None = Field(None, description="the figure is a ratio to that of these rows")
    over_figure: str | None = Field(None, description="the ratio is to another figure, of ``over`` or of the same row")
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_side(self) -> Target:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give either at_least or at_most")
        return self


class Section(_Strict):
    title: str
    topic: str = Field("", description="sections of one topic follow one another, under its heading")
    kind: Kind
    caption: str = Field("", description="a paragraph that holds for any record")
    sources: tuple[Source, ...] = Field(min_length=1)
    needs: int = Field(1, ge=1, description="how many of the sources must exist for the section to be shown")
    rows: dict[str, list[str | int]] = Field(default_factory=dict, description="rows to show, by a field's values; all")
    targets: tuple[Target, ...] = ()

    def shows(self, row: dict[str, Any]) -> bool:
        return all(row.get(name) in values for name, values in self.rows.items())


class SummaryRecord(_Strict):
    """A file of benchmarks/results/, and what its rows are called where the record does not say."""

    file: str
    name: str = ""


class SummaryTable(_Strict):
    title: str
    caption: str
    kind: SummaryKind
    length: int | None = Field(None, description="tokens a sequence of the rows to show; None: of any length")
    records: tuple[SummaryRecord, ...] = Field(min_length=1)


class Summary(_Strict):
    """The tables that the page opens with."""

    tables: tuple[SummaryTable, ...] = ()
    note: str = Field("", description="what a reader of the tables must know")


class Preparation(_Strict):
    """A file or folder that a command needs if one of the words ``wanted_by`` is in it, and the command for it."""

    makes: str
    command: str
    wanted_by: tuple[str, ...]


class Page(_Strict):
    summary: Summary = Summary()
    introduction: str = Field(description="how to read what follows the summary")
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
