"""How every command speaks.

Standard output holds the result: a table, or with ``--json`` one JSON document and nothing else. Standard error holds
the rest: progress, notes, and errors as one line. ``--quiet`` leaves errors (and ``--json``'s document) alone. So each
command takes ``quiet: Quiet = False, as_json: Json = False`` and ends with ``tell``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pahq.cli import codes

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Manner:
    """What ``main`` hands to the command as the context's object, to know how to report an error that ends it."""

    as_json: bool = False


def _noted(context: typer.Context, value: bool) -> bool:
    """Options may come from a file (``--config``), so that the command line alone does not tell."""
    if isinstance(context.obj, Manner) and value:
        context.obj.as_json = True
    return value


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and --json's output).")]
Json = Annotated[
    bool, typer.Option("--json", callback=_noted, help="Print one JSON document on standard output, errors too.")
]


def tell(
    record: Any, show: Callable[[Console], object], *, quiet: bool, as_json: bool, written: object | None = None
) -> None:
    """A command's last word: ``record`` as JSON, or nothing, or what ``show`` prints.

    record: what JSON can hold, numbers that it lacks (NaN, infinity) become null; its keys are stable. written: the
    file or folder where all of it lies, named after the table.
    """
    if as_json:
        document(record)
    elif not quiet:
        from pahq.report.console import make_console

        console = make_console()
        show(console)
        if written is not None:
            console.print(f"written: {written}", soft_wrap=True)


def document(value: Any) -> None:
    """Prints the JSON document of a command."""
    from pahq.report.tables import as_json as plain

    print(json.dumps(plain(value), indent=1, allow_nan=False))


def failed(message: str, code: int) -> None:
    """Prints the document of a command that failed: ``kind`` is ``bug``, ``refused`` or ``interrupted``."""
    kind = {codes.BUG: "bug", codes.INTERRUPTED: "interrupted"}.get(code, "refused")
    document({"error": {"kind": kind, "code": code, "message": message}})


def fail(message: str, code: int, as_json: bool) -> int:
    """One line on standard error, and with ``--json`` a document, too; -> the exit code."""
    message = " ".join(message.split())
    print(message if code == codes.INTERRUPTED else f"error: {message}", file=sys.stderr)
    if as_json:
        try:
            failed(message, code)
            sys.stdout.flush()
        except BrokenPipeError:
            mute()
    return code


def mute() -> None:
    """The reader of standard output (head, less) had enough: what is left goes nowhere, without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
