"""A figure before it is drawn, and the files it becomes. matplotlib is optional: it is imported when one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.files import naming, write_atomic
from pahq.report.figures.style import COLUMN, LARGE, PAGE, style, wrapped
from pahq.report.tables import Row, as_csv

MISSING = "no plot: matplotlib is not installed (pip install 'pahq[plot]')"
_MISSING = f"plot: {MISSING.removeprefix('no plot: ')}"
FORMATS = ("svg", "pdf", "png")
WIDTHS = {"column": COLUMN, "page": PAGE}
NARROWEST, WIDEST = 2.5, 20.0
DPI = 300
"""Of PNG, and of the parts of other files that are too many for lines."""
_METADATA: dict[str, dict[str, Any]] = {
    "svg": {"Date": None},
    "pdf": {"CreationDate": None, "ModDate": None},
    "png": {"Software": None},
}
"""The same figure is the same bytes, whenever it is drawn."""

Draw = Callable[[Any, Sequence[Row]], None]
"""Fills a matplotlib Figure of a given width from rows, and sets its height."""


@dataclass(frozen=True)
class Chart:
    """A figure's rows, and what draws them.

    kind: as ``pahq plot`` calls it. rows: its data, which go beside it as CSV. notes: what its readers must know.
    """

    kind: str
    draw: Draw
    rows: Sequence[Row]
    notes: tuple[str, ...] = ()

    def figure(self, width: str | float = "column", title: str | None = None) -> Any:
        """The matplotlib ``Figure``. Raises PahqError for an odd width, and where matplotlib is missing."""
        inches = inches_of(width)
        try:
            with style():
                return _filled(self.draw, self.rows, inches, title)
        except ModuleNotFoundError as error:
            raise _missing(error) from None

    def save(self, path: str | PathLike[str], width: str | float = "column", title: str | None = None) -> Path:
        """Draws it into an ``.svg``, ``.pdf`` or ``.png`` file, the data beside it as ``.csv`` -> the figure's path.

        width: ``column`` (3.25 inches), ``page`` (6.75) or inches. Both files appear whole, and are the same bytes
        for the same data. Raises PahqError for a name or width that cannot be, a folder that is not there, data of
        something else in the CSV's place, and where matplotlib is missing.
        """
        path = Path(path)
        data = as_csv(self.rows)
        check_place(path, data)
        inches = inches_of(width)
        try:
            with style():
                image = _encoded(_filled(self.draw, self.rows, inches, title), path.suffix[1:].lower())
        except ModuleNotFoundError as error:
            raise _missing(error) from None
        write_atomic(data_file(path), data)
        write_atomic(path, image)
        return path

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        image = draw(self.draw, self.rows)
        if image is None:
            raise PahqError(_MISSING)
        return image


def draw(plot: Draw, rows: Sequence[Row]) -> bytes | None:
    """A plot as PNG in the width of a page, None without matplotlib."""
    try:
        with style():
            return _encoded(_filled(plot, rows, PAGE, None), "png")
    except ModuleNotFoundError as error:
        _missing(error)
        return None


def inches_of(width: str | float) -> float:
    """``column``, ``page`` or a number -> inches; raises PahqError for anything else."""
    if isinstance(width, str) and width in WIDTHS:
        return WIDTHS[width]
    try:
        inches = float(width)
    except ValueError:
        inches = math.nan
    if not NARROWEST <= inches <= WIDEST:
        raise PahqError(
            f"width: '{width}' is no width; give column ({COLUMN:g} inches), page ({PAGE:g} inches) or inches from "
            f"{NARROWEST:g} to {WIDEST:g}"
        )
    return inches


def data_file(path: Path) -> Path:
    """Where the data of a figure lie."""
    return path.with_suffix(".csv")


def check_place(path: Path, data: bytes | None = None) -> None:
    """Raises PahqError where no figure can go. data: what is to go beside it; None: not known yet."""
    if path.suffix[1:].lower() not in FORMATS:
        raise PahqError(f"{path}: '{path.suffix}' is no format of figures; give a name that ends in .svg, .pdf or .png")
    if path.is_dir():
        raise PahqError(f"{path}: a folder lies there; give the name of a file")
    if not path.parent.is_dir():
        raise PahqError(f"{path}: there is no folder {path.parent}; make it first, or choose another file")
    beside = data_file(path)
    if data is None or not beside.exists() or any(path.with_suffix(f".{ending}").exists() for ending in FORMATS):
        return  # an earlier drawing of the figure, which is replaced
    with naming(beside):
        same = beside.read_bytes() == data
    if not same:
        raise PahqError(f"{beside}: it lies where the figure's data would go; choose another name for the figure")


def _filled(plot: Draw, rows: Sequence[Row], inches: float, title: str | None) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(inches, inches * 0.7), layout="constrained")  # not pyplot's, which keeps global state
    FigureCanvasAgg(figure)
    plot(figure, rows)
    if title is not None and title.strip():
        text = wrapped(title, inches - 0.2, LARGE)
        figure.suptitle(text)
        figure.set_figheight(figure.get_figheight() + (text.count("\n") + 1) * 1.3 * LARGE / 72 + 0.04)
    return figure


def _encoded(figure: Any, form: str) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format=form, dpi=DPI, metadata=_METADATA[form])
    return image.getvalue()


def _missing(error: ModuleNotFoundError) -> PahqError:
    """Raises anything but the absence of matplotlib anew."""
    if error.name is None or error.name.partition(".")[0] != "matplotlib":
        raise error
    return PahqError(_MISSING)
