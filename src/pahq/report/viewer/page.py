"""The page itself: a template built from ``viewer/``, and a circuit's data in it as JSON that can only be text."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.files import encoded, naming, write_atomic

FORMAT = "pahq-viewer-1"
_OPEN, _CLOSE = '<script type="application/json" id="data">', "</script>"
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
"""Characters that could end or open an element, or a line of script; in JSON they occur inside strings alone."""


def page(data: dict[str, Any]) -> bytes:
    """The HTML page that shows ``data``, whole: style, script and graph library are part of it.

    Numbers that are not finite become null. Raises PahqError where the installed template is damaged.
    """
    template = files("pahq.report.viewer").joinpath("template.html").read_text("utf-8")
    before, mark, rest = template.partition(f"{_OPEN}{_CLOSE}")
    if not mark:
        raise PahqError("viewer: template.html has no place for data; install pahq anew, or run npm run build again")
    return encoded(before + _OPEN + escaped({"format": FORMAT, **data}) + _CLOSE + rest)


def escaped(value: Any) -> str:
    """Compact JSON in which no character means anything to an HTML parser."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPES)


def write_page(path: Path, data: dict[str, Any]) -> int:
    """Writes the page at once -> its bytes. Raises PahqError where that cannot be done."""
    content = page(data)
    write_atomic(path, content)
    return len(content)


def read_page(path: Path) -> dict[str, Any] | None:
    """The data in a page written by ``write_page``; None where there is none, or not of this format."""
    if not path.is_file():
        return None
    with naming(path):
        text = path.read_text("utf-8", errors="replace")
    found, _, _ = text.partition(_OPEN)[2].partition(_CLOSE)
    try:
        data = json.loads(found)
    except ValueError:
        return None
    return data if isinstance(data, dict) and data.get("format") == FORMAT else None


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
