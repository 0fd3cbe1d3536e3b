"""Colours, sizes and fonts of all figures.

The colours are the viewer's, which are Okabe and Ito's: the colour-blind can tell them apart. Whatever a colour says
is said by a mark's shape, a dash or a place as well.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

COLUMN, PAGE = 3.25, 6.75
"""Widths in inches: of one of two columns, and of a page (the templates of ICML and ACL)."""
INK, SOFT, FAINT, NODE = "#1b1f24", "#59626d", "#c3c9d1", "#eceff3"
BLUE, RED, GREEN, GREY, DARK = "#0072b2", "#c65200", "#00815f", "#6b7480", "#3d444d"
KINDS = {"q": BLUE, "k": RED, "v": GREEN, "qkv": BLUE, "mlp": GREY, "logits": DARK}
"""Edges by what reads them."""
STATUS = {"both": "#0072b2", "missed": "#d98200", "extra": "#b5478d"}
DASHES = {"both": "-", "missed": (0, (4, 2)), "extra": (0, (1, 1.2))}
"""Edges of two circuits: in both, in the second alone, in the first alone."""
METHODS = {
    "acdc": BLUE,
    "eap-ig": RED,
    "exact": INK,
    "eap": "#d98200",
    "subnetwork-probing": GREEN,
    "edge-pruning": "#b5478d",
    "hisp": "#56b4e9",
    "information-flow": "#7014cc",
    "random": "#a3adb8",
}
"""A method has the same colour in every figure."""
BROKEN = ("--", ":", "-.")
MARKS = ("o", "s", "D", "^", "v", "P", "X", "<", ">")
SMALL, NORMAL, LARGE = 6.5, 7.0, 8.0
"""Sizes of text in points, as printed."""


@dataclass(frozen=True)
class Look:
    """colour, mark, line: as matplotlib takes them."""

    colour: str
    mark: str
    line: str


def looks(names: Sequence[str]) -> dict[str, Look]:
    """How each group of runs is drawn. Names begin with a method; the plain or first one has that method's colour.

    Others take colours that are left over; once all are taken, they have their method's again, in broken lines.
    """
    order, found = list(METHODS.values()), dict[str, str]()
    for name in sorted(dict.fromkeys(names), key=lambda name: name not in METHODS):
        colour = METHODS.get(_method(name))
        if colour is not None and colour not in found.values():
            found[name] = colour
    left = [colour for colour in order if colour not in found.values()]
    looks: dict[str, Look] = {}
    again = 0
    for place, name in enumerate(dict.fromkeys(names)):
        if name in found or left:
            colour = found[name] if name in found else left.pop(0)
            looks[name] = Look(colour, MARKS[order.index(colour)], "-")
        else:
            colour = METHODS.get(_method(name), order[place % len(order)])
            looks[name] = Look(
                colour, MARKS[(order.index(colour) + 1 + again) % len(MARKS)], BROKEN[again % len(BROKEN)]
            )
            again += 1
    return looks


def _method(name: str) -> str:
    return name.partition(" ")[0]


def shown(text: str) -> str:
    """The text without what no font can show and SVG cannot hold (control characters, halves of characters)."""
    kept = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return " " + kept if kept.startswith("_") else kept  # matplotlib leaves labels with "_" out of legends


def wrapped(text: str, inches: float, size: float = NORMAL) -> str:
    """The text in lines of about so many inches at a size in points."""
    columns = max(8, int(inches * 72 / (0.58 * size)))
    return "\n".join(textwrap.fill(line, columns, break_on_hyphens=False) for line in shown(text).splitlines())


@contextlib.contextmanager
def style() -> Iterator[None]:
    """matplotlib's own defaults and these figures' settings within the block, whatever the user's are."""
    import warnings

    import matplotlib
    import matplotlib.style
    from cycler import cycler

    settings: Any = {
        "font.family": ["DejaVu Sans", "sans-serif"],  # comes with matplotlib
        "font.size": NORMAL,
        "axes.titlesize": NORMAL,
        "axes.labelsize": NORMAL,
        "xtick.labelsize": SMALL,
        "ytick.labelsize": SMALL,
        "legend.fontsize": SMALL,
        "legend.title_fontsize": SMALL,
        "figure.titlesize": LARGE,
        "legend.frameon": False,
        "legend.handlelength": 2.2,
        "legend.columnspacing": 1.4,
        "legend.labelspacing": 0.35,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.axisbelow": True,
        "grid.linewidth": 0.5,
        "grid.color": "#e3e7ec",
        "lines.linewidth": 1.2,
        "lines.markersize": 3.4,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.minor.width": 0.4,
        "ytick.minor.width": 0.4,
        "xtick.major.size": 2.5,
        "ytick.major.size": 2.5,
        "xtick.minor.size": 1.5,
        "ytick.minor.size": 1.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": SOFT,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.prop_cycle": cycler("color", list(METHODS.values())),
        "figure.constrained_layout.h_pad": 0.03,
        "figure.constrained_layout.w_pad": 0.03,
        "text.parse_math": False,  # names of files and tasks may hold a dollar sign
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "pahq",  # the same names of parts each time
        "pdf.fonttype": 42,  # whole fonts, which journals ask for
        "ps.fonttype": 42,
    }
    with matplotlib.style.context("default"), matplotlib.rc_context(settings), warnings.catch_warnings():
        # Of characters that the font lacks: they appear as boxes, and in SVG as they are.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph", category=UserWarning)
        yield


def legend(figure: Any, handles: Sequence[Any], labels: Sequence[str], title: str | None = None) -> float:
    """A legend below everything, in as many columns as fit -> its height in inches."""
    if not handles:
        return 0.0
    width = figure.get_figwidth()
    texts = [wrapped(label, width - 0.5, SMALL) for label in labels]
    longest = max(len(line) for text in texts for line in text.split("\n"))
    columns = max(1, min(len(texts), int((width - 0.1) / (longest * 0.56 * SMALL / 72 + 0.55))))
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, title=title)
    lines = sum(
        max(text.count("\n") + 1 for text in texts[row::rows])
        for rows in [-(-len(texts) // columns)]
        for row in range(rows)
    )
    return (lines + (title is not None)) * 1.37 * SMALL / 72 + 0.08


def numeral(value: float) -> str:
    """A number on an axis; small powers of ten as such."""
    power = round(math.log10(value)) if value > 0 else 0
    if power < -3 and math.isclose(value, 10.0**power):
        return "10\N{SUPERSCRIPT MINUS}" + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(-power))
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}").replace("-", "\N{MINUS SIGN}")


def plain_ticks(axis: Any, few: bool = False) -> None:
    """Numbers on a logarithmic axis as they are read aloud. few: on decades alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0,) if few else (1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: numeral(value)))
    axis.set_minor_formatter(NullFormatter())
