"""``pahq methods``: the methods there are, and their options."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any

from pahq.cli.output import Json, Quiet, tell
from pahq.method.registry import METHODS, Method

if TYPE_CHECKING:
    from rich.console import Console


def methods(quiet: Quiet = False, as_json: Json = False) -> None:
    """List the methods with their options and defaults.

    For --method, --prefilter and --method-option of 'pahq discover'.
    """
    tell([_facts(method) for method in METHODS.values()], _show, quiet=quiet, as_json=as_json)


def _show(console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("method", "family", "what it does, and its options"):
        table.add_column(title, no_wrap=title != "what it does, and its options")
    for method in METHODS.values():
        options = _facts(method)["options"]
        shown = " ".join(f"{name}={_word(value)}" for name, value in options.items())
        table.add_row(method.name, method.family, Text(method.about + (f"\n  {shown}" if shown else "")))
    console.print(table)


def _facts(method: Method) -> dict[str, Any]:
    cls = method.options_class
    return {
        "name": method.name,
        "family": method.family,
        "about": method.about,
        "natural_threshold": method.natural,
        "options": {} if cls is None else {f.name: _default(f) for f in fields(cls) if f.init},
    }


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    words = {None: "none", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)  # 0.0 is no "false"
