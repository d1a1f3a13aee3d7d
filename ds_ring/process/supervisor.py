"""DeepSpeed's launcher as a child of ours (``process/child.py``), whose end is judged by what ranks told.

What it and the ranks print on standard output goes to standard error, where it does not mix with the result.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence

from ds_ring.process.child import started
from ds_ring.process.outcome import NO_STDOUT, OURS, Outcomes
from ds_ring.process.run_watch import RunWatch
from ds_ring.utils.streams import print_result

CommandOf = Callable[[Mapping[str, str]], Sequence[str]]


def supervise(command: Sequence[str] | CommandOf, environment: dict[str, str], timeout_s: float) -> int:
    """Run ``command`` to its end, print the result, and return this process's exit code.

    Args:
        command: its words, or what makes them of the environment variables by which ranks tell how they end.
        timeout_s: a process of the run that is stopped for longer ends it; 0: never.
    """
    with Outcomes() as outcomes:
        words = command(outcomes.environment) if callable(command) else command
        with started(words, environment | outcomes.environment, stdout=2) as child:
            why = child.wait(RunWatch(child.process.pid, outcomes, timeout_s).reason_to_end)
        return _judge(child.process.returncode, outcomes, why)


def _judge(returned: int, outcomes: Outcomes, why: str) -> int:
    """Print the result, if there is one, and what went wrong; returns the exit code."""
    completed, failed = outcomes.completed(), outcomes.failed()
    code = failed or 0
    # Ranks that lose their launcher may tell of a failure of theirs: the reason is the launcher.
    if completed is None and (failed is None or (failed == OURS and returned <= 0)):
        ended = f"the launcher ended {_how(returned)} and without a result"
        # It returns 0 where it lost a process of its own, and 256 - n where a rank died of signal n.
        killed = "" if 0 < returned < 128 else ": a process of the run was killed"
        print(f"failed: {why or ended + killed}", file=sys.stderr, flush=True)
        code = OURS
    elif completed is not None and failed is None and returned > 0:
        print(f"failed: after the result the launcher ended {_how(returned)}", file=sys.stderr, flush=True)
        code = OURS
    if completed is not None and completed.result is not None:
        try:
            print_result(completed.result)
        except OSError as error:
            print(f"failed: standard output could not be written: {error.strerror}", file=sys.stderr, flush=True)
            code = code or NO_STDOUT
    return code


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
