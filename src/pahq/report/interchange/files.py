"""A file of unknown format, read once and looked at as text, as JSON or as bytes."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.files import naming

MISSING = object()
"""What ``File.json`` is where the file is no JSON."""


class File:
    """Raises PahqError where the path cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming(path):
            path.stat()

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @cached_property
    def data(self) -> bytes:
        """Empty for a folder."""
        if self.is_folder:
            return b""
        with naming(self.path):
            return self.path.read_bytes()

    @property
    def is_zip(self) -> bool:
        return self.data.startswith(b"PK\x03\x04")

    @cached_property
    def text(self) -> str:
        """Empty for what is not UTF-8."""
        try:
            return self.data.decode("utf-8-sig")
        except UnicodeDecodeError:
            return ""

    @cached_property
    def json(self) -> Any:
        """The content as JSON, or ``MISSING``. NaN and infinities are allowed, as Python's own writer has them."""
        if not self.text.lstrip().startswith(("{", "[")):
            return MISSING
        try:
            return json.loads(self.text)
        except RecursionError:
            raise PahqError(f"{self.path}: JSON nested too deeply; give a file of one of the known formats") from None
        except ValueError:
            return MISSING

    @cached_property
    def json_lines(self) -> list[Any] | None:
        """The content as one JSON object a line, None where it is not."""
        try:
            lines = [json.loads(line) for line in self.text.split("\n") if line.strip()]
        except (ValueError, RecursionError):
            return None
        return lines if lines and all(isinstance(line, dict) for line in lines) else None
