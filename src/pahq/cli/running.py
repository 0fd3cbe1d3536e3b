"""What commands do around their work: the record of what was typed, progress, Ctrl-C."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import Any


class Interrupted(Exception):
    """Ctrl-C. Its text is what the user is told: what is left of the work, and how to go on with it."""


def typed() -> str:
    """The command as it was typed."""
    return shlex.join(["pahq", *sys.argv[1:]])


def guarded(
    run: Callable[[dict[str, Any]], Any], quiet: bool, left: Callable[[], str] = lambda: "nothing was written"
) -> Any:
    """Calls ``run`` with a watch and the command. left: says after Ctrl-C what there is of the work.

    Raises Interrupted.
    """
    from pahq.report.progress import watch_for

    try:
        return run({"watch": watch_for(quiet=quiet), "command": typed()})
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {left()}") from None
