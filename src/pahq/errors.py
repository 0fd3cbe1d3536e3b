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


def choices(name: object, known: Iterable[str], word: str = "known:", otherwise: str | None = None) -> str:
    """The mend for a name that is unknown: the one that was probably meant, or all of them after ``word``.

    otherwise: what to say in the place of all of them, where they are too many for a line.
    """
    known = list(known)
    near = get_close_matches(str(name), known, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"{word} {', '.join(known)}" if otherwise is None else otherwise
