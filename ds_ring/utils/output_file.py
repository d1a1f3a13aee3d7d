"""Files that commands leave: replaced in one step, or written into where they are no regular files.

A regular file is replaced by a rename, so that after a full disk or an interruption the previous one is unchanged. A
link is followed: the file that it leads to is replaced. Devices and FIFOs are opened and written into.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from errno import EISDIR, ENXIO
from pathlib import Path

from ds_ring.errors import OutputError

UNFINISHED = ".ds_ring."
"""How a file's name begins that becomes the result by a rename: ``.ds_ring.HOST.PROCESS.…``"""


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replace the file ``path`` by ``content``, text as UTF-8; see above.

    Raises:
        OutputError: it cannot be written. A regular file is as it was before.
    """
    try:
        _write(Path(path), [content.encode("utf-8") if isinstance(content, str) else content])
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror}") from None


def write_parts_atomically(path: str | Path, parts: Iterable[bytes]) -> None:
    """``write_atomically`` of the ``parts`` one behind the other, which need not be in memory together."""
    try:
        _write(Path(path), parts)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror}") from None


def _write(path: Path, parts: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_special(path):
        with open(os.open(path, os.O_WRONLY), "wb", buffering=0) as file:
            for part in parts:
                _write_all(file.fileno(), part)
        return
    target = _followed(path)
    # A name that does not grow with the target's, which may be as long as names can be.
    descriptor, name = tempfile.mkstemp(prefix=f"{_unfinished_here()}{os.getpid()}.", dir=target.parent)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            for part in parts:
                _write_all(file.fileno(), part)
        _copy_mode(target, Path(name))
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def remove_unfinished(path: str | Path) -> None:
    """Remove what killed processes have left where ``path`` is written: files that were to replace one.

    Those of this host alone: whether a process of another one writes still, is not to be seen here.
    """
    folder, prefix = _followed(Path(path)).parent, _unfinished_here()
    with suppress(OSError):
        for name in os.listdir(folder):
            process = name.removeprefix(prefix).partition(".")[0]
            if name.startswith(prefix) and process.isdecimal() and not _runs(int(process)):
                (folder / name).unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Make the folder of ``path``, and find out whether ``write_atomically`` can write it. Changes no file.

    Raises:
        OSError: it cannot be written: a folder, a socket, no permission, a name too long, a link that leads nowhere…
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        if stat.S_ISSOCK(mode):
            raise OSError(ENXIO, os.strerror(ENXIO))
        if not os.access(path, os.W_OK):
            raise PermissionError(13, os.strerror(13))
    if not is_special(path):
        with suppress(FileNotFoundError):
            os.lstat(partial_of(path))  # its name is the longest
        with tempfile.TemporaryFile(dir=_followed(path).parent):
            pass


def is_special(path: str | Path) -> bool:
    """Whether ``path`` is there and leads to a device, a FIFO or a socket."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def partial_of(path: str | Path) -> Path:
    """Where the rows so far are kept while a result is not complete: ``out.partial.json`` beside ``out.json``."""
    path = Path(path)
    return path.with_name(f"{path.stem}.partial{path.suffix or '.json'}")


def _unfinished_here() -> str:
    return f"{UNFINISHED}{os.uname().nodename}."


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    with suppress(OSError):  # one that nobody has waited for yet
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True


def _followed(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _copy_mode(source: Path, made: Path) -> None:
    """Give ``made`` the permissions of ``source``; without it those of any new file."""
    if source.exists():
        shutil.copymode(source, made)
        return
    mask = os.umask(0)
    os.umask(mask)
    made.chmod(0o666 & ~mask)
