"""Reading and writing files so that nobody meets a half-written one or a bare OSError."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pahq.errors import PahqError

_MENDS = {
    errno.ENOSPC: "no space is left on the device; free some and start the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and start the same command again",
    errno.EFBIG: "the file would exceed the allowed size; raise the limit (ulimit -f) and start the same command again",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose a folder that you may write to",
    errno.EPERM: "permission denied; choose a folder that you may write to",
    errno.ENOTDIR: "a file lies where a folder is needed; choose another path",
    errno.EEXIST: "a file lies where a folder is needed; choose another path",
    errno.EISDIR: "a folder lies where a file is needed; choose another path",
    errno.ENOENT: "there is no such file or folder; check the path",
}


def explain(error: OSError, path: str | os.PathLike[str] | None = None) -> str:
    """One line for an OSError: the path, what is wrong, the mend."""
    where = path if path is not None else error.filename
    reason = _MENDS.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
    return f"{os.fspath(where)}: {reason}" if where is not None else reason


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError of the block into a PahqError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise PahqError(explain(error, path)) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path`` at once: a reader sees the old file or the whole new one, after a crash too.

    Raises PahqError naming ``path``; nothing is left behind then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def write_json(path: Path, value: Any) -> None:
    """``write_atomic`` of readable JSON. Floats are written in full, so that they read back exactly."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; raises PahqError if it is missing or damaged."""
    try:
        with naming(path):
            value = json.loads(path.read_bytes())
    except ValueError as error:
        raise PahqError(f"{path}: not valid JSON ({error}); the file is damaged") from error
    if not isinstance(value, dict):
        raise PahqError(f"{path}: holds a JSON {type(value).__name__}, not an object; the file is damaged")
    return value
