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


def write_all(file: int, data: bytes) -> None:
    """Writes all of ``data`` to a file descriptor; a single write may take only a part, when the disk fills up, say."""
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def write_json(path: Path, value: Any) -> None:
    """``write_atomic`` of readable JSON. Floats are written in full, so that they read back exactly."""
    write_atomic(path, encoded(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"))


def encoded(text: str) -> bytes:
    """UTF-8. Lone surrogates, which a tokenizer may give, or a file name that is no text, have none: they are written
    out with a backslash, as JSON has them.
    """
    return text.encode("utf-8", "backslashreplace")


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


def parse_yaml(text: str, where: str | os.PathLike[str]) -> Any:
    """Plain values from YAML. Raises PahqError that names ``where`` if it is broken, or a name comes twice."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        twice = _twice(node)
        if twice is not None:
            raise PahqError(f"{os.fspath(where)}: '{twice}' is there twice; remove one")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{os.fspath(where)}: line {mark.line + 1}" if mark is not None else os.fspath(where)
        raise PahqError(f"{place}: broken YAML ({getattr(error, 'problem', None) or error}); mend it") from None


def _twice(root: Any) -> str | None:
    """A name that a mapping in the YAML tree holds twice, of which YAML would keep the last in silence."""
    left, seen = [root], set[int]()
    while left:
        node = left.pop()
        if node is None or id(node) in seen:  # an anchor may be referred to often, even by itself
            continue
        seen.add(id(node))
        if node.id == "mapping":
            names = [str(key.value) for key, _ in node.value]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                return twice
            left += [value for _, value in node.value]
        elif node.id == "sequence":
            left += node.value
    return None
