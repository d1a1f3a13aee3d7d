"""A process that outlives the one that started it, and clears up after it: whatever ends a command, even SIGKILL, the
processes that it started end in a second and its scratch folders go.

It reads orders from a pipe, which the system closes when the command ends. Run as a script, which imports nothing else.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

LEAVING_S = 5.0


class Keeper:
    """The keeper of this process; as a context manager. Nothing happens where the block ends by itself."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
        )  # fmt: skip

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._order("leave")
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(LEAVING_S)
        except subprocess.TimeoutExpired:  # it was stopped
            self._process.kill()
            self._process.wait()

    @contextmanager
    def group(self, leader: int) -> Iterator[None]:
        """During the block the processes of group ``leader`` are killed should this process end."""
        self._order(f"group {leader}")
        try:
            yield
        finally:
            self._order(f"no group {leader}")

    @contextmanager
    def folder(self, path: Path) -> Iterator[None]:
        """During the block ``path`` is removed, with all that is in it, should this process end."""
        name = os.fsencode(path.absolute()).hex()
        self._order(f"folder {name}")
        try:
            yield
        finally:
            self._order(f"no folder {name}")

    def _order(self, order: str) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # it may have been killed: then nobody clears up after us
            self._process.stdin.write(f"{order}\n".encode())
            self._process.stdin.flush()


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder that is removed at the end of the block, or of this process, whatever ends it."""
    folder = tempfile.TemporaryDirectory(prefix="ds_ring.", dir=parent)
    with Keeper() as keeper, folder as name, keeper.folder(Path(name)):
        yield Path(name)


def tree_of(group: int) -> list[int]:
    """The processes of a group and what they started, in whatever group that is: pdsh gives its ssh others. Empty on
    other systems than Linux."""
    found: dict[int, tuple[int, int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            # pid (name) state parent group …; the name may contain anything, parentheses and blanks included.
            _, parent, own, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            found[int(folder.name)] = int(parent), int(own)
    tree = {pid for pid, (_, own) in found.items() if own == group}
    while more := {pid for pid, (parent, _) in found.items() if parent in tree and pid not in tree}:
        tree |= more
    return sorted(tree)


def kill_all(processes: list[int]) -> None:
    for pid in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def clear_up() -> None:
    """Read orders to their end, and clear up unless the last is to leave."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    kept: dict[tuple[str, str], None] = {}
    for line in sys.stdin:
        match line.split():
            case ["leave"]:
                return
            case ["no", what, name]:
                kept.pop((what, name), None)
            case [what, name]:
                kept[what, name] = None
    for what, name in kept:
        if what == "group":
            kill_all(tree_of(int(name)))
    for what, name in kept:
        if what == "folder":
            shutil.rmtree(os.fsdecode(bytes.fromhex(name)), ignore_errors=True)


if __name__ == "__main__":
    clear_up()
