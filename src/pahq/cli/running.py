"""What commands do around their work: the record of what was typed, progress, Ctrl-C."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import Any

import typer

from pahq.cli.codes import INTERRUPTED


def typed() -> str:
    """The command as it was typed."""
    return shlex.join(["pahq", *sys.argv[1:]])


def guarded(run: Callable[[dict[str, Any]], dict[str, Any]], quiet: bool) -> dict[str, Any]:
    """Calls ``run`` with a watch and the command; Ctrl-C ends it, and nothing is written then."""
    from pahq.report.progress import watch_for

    try:
        return run({"watch": watch_for(quiet=quiet), "command": typed()})
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
