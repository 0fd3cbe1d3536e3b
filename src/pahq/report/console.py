"""The one place that decides how text reaches a screen, a file or a pipe."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 1000
"""Columns where no terminal limits a line: a file or a pipe gets whole rows, as wide as they are and no wider."""


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sees ``stream`` as it is written."""
    return stream is not None and stream.isatty()


def is_dumb() -> bool:
    """Whether the terminal can neither colour nor go back in a line (``TERM=dumb``), as in an editor's window."""
    return os.environ.get("TERM", "").lower() in ("dumb", "unknown")


def watched(stream: TextIO | None) -> bool:
    """Whether a bar that moves makes sense there."""
    return is_terminal(stream) and not is_dumb()


def make_console(stream: TextIO | None = None) -> Console:
    """A console for ``stream`` (standard output by default): words as they are, nothing read as markup.

    Neither colour nor bold type with ``NO_COLOR`` (any value but an empty one, https://no-color.org), on a dumb
    terminal, in a file or in a pipe; ``FORCE_COLOR`` brings them back in the latter two.
    """
    from rich.console import Console

    stream = sys.stdout if stream is None else stream
    plain = bool(os.environ.get("NO_COLOR")) or is_dumb()
    return Console(
        file=stream,
        color_system=None if plain else "auto",
        width=None if is_terminal(stream) else WIDE,
        highlight=False,
        markup=False,
        emoji=False,
    )
