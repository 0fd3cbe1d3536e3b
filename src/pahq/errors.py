"""The one exception that a user is meant to see: a single line naming the thing, the value and the mend."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PahqError(Exception):
    """Bad input or an impossible request. The command line prints it as one line and exits with code 2.

    Write messages as ``thing: what is wrong with which value; what to do``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


def choices(name: object, known: Iterable[str], word: str = "known:") -> str:
    """The mend for a name that is unknown: the one that was probably meant, or all of them after ``word``."""
    known = list(known)
    near = get_close_matches(str(name), known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"{word} {', '.join(known)}"
