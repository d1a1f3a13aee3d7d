"""What no trial may leave behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

BARS = ("processes left", "exit code 0 without a result", "a result wrong or lost")


def broken(record: Mapping[str, Any]) -> list[str]:
    """The bars that a trial's record breaks."""
    ours, result = record["command"].startswith("ds-ring"), record["result"]
    found = []
    if record["left"]:
        found.append(BARS[0])
    # DeepSpeed's own exit code means nothing; there the result's mark of completion counts.
    if ours and record["exit_code"] == 0 and result != "complete":
        found.append(BARS[1])
    if result not in ("previous", "complete"):
        found.append(BARS[2])
    return found


def summary(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How many trials there were, how many were hit in time, and how many break each bar."""
    records = list(records)
    counts = Counter(bar for record in records for bar in broken(record))
    gone = [record["gone_s"] for record in records if record["hit"] and record["gone_s"] is not None]
    return {
        "trials": len(records),
        "hit": sum(record["hit"] for record in records),
        "longest_s": max(gone, default=None),
        **{bar: counts[bar] for bar in BARS},
    }
