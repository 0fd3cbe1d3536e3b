"""The one exception that a user is meant to see: a single line naming the thing, the value and the mend."""

from __future__ import annotations


class PahqError(Exception):
    """Bad input or an impossible request. The command line prints it as one line and exits with code 2.

    Write messages as ``thing: what is wrong with which value; what to do``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))
