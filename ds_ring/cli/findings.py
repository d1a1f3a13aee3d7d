"""What a check found, as lines for the terminal and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["ok", "slower", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        what: the thing that was checked.
        outcome: "slower": a run works, but not as fast as it could.
        fix: what to do; empty where nothing is wrong.
    """

    what: str
    outcome: Outcome
    detail: str
    fix: str = ""


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "problems": sum(finding.outcome == "problem" for finding in findings),
        "slower": sum(finding.outcome == "slower" for finding in findings),
        "checks": [vars(finding) for finding in findings],
    }


def show(findings: Sequence[Finding], say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> None:
    for finding in findings:
        say(f"{finding.outcome:8} {finding.what}: {finding.detail}" + (f"; {finding.fix}" if finding.fix else ""))
