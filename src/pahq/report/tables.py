"""Rows of figures as a table on the screen, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from pahq.files import encoded

Row = dict[str, Any]


def plain(value: Any) -> str:
    return "–" if value is None else str(value)


def number(digits: int) -> Callable[[Any], str]:
    """Floats with so many significant digits."""

    def show(value: Any) -> str:
        if value is None:
            return "–"
        return ("∞" if value > 0 else "-∞") if math.isinf(value) else f"{value:.{digits}g}"

    return show


def decimals(digits: int) -> Callable[[Any], str]:
    """Floats with so many digits after the point."""

    def show(value: Any) -> str:
        if value is None:
            return "–"
        if math.isinf(value):
            return "∞" if value > 0 else "-∞"
        return f"{round(value, digits) + 0.0:.{digits}f}"  # adding zero turns -0.0 into 0.0

    return show


def known(show: Callable[[Any], str]) -> Callable[[Any], str]:
    """The same for values that may be missing."""
    return lambda value: "–" if value is None else show(value)


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def mebibytes(value: int) -> str:
    return f"{value / 2**20:,.1f}" if value >= 2**20 else f"{value / 2**20:.3f}"


@dataclass(frozen=True)
class Column:
    """A column on the screen: the rows' key, its title, and how a value is shown. left: text, not figures."""

    key: str
    title: str
    show: Callable[[Any], str] = plain
    left: bool = False


def screen(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """The rows as a rich table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(Text(column.title), justify="left" if column.left else "right")
    for row in rows:
        table.add_row(*(Text(column.show(row[column.key])) for column in columns))
    return table


def as_csv(rows: Sequence[Row]) -> bytes:
    """All the rows' figures in full; infinite ones as ``inf``, missing ones empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return encoded(text.getvalue())


def as_json(value: Any) -> Any:
    """The same value with None in place of numbers that JSON lacks (infinity, NaN)."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
