"""``pahq view``: a run's circuit as a page for the browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def view(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    against: Annotated[Path | None, typer.Option(help="Folder of another run to lay over this one's circuit.")] = None,
    truth: Annotated[
        str | None, typer.Option(help="A known circuit (see 'pahq truth') or a .json file of edges to lay over it.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file to write (default: viewer.html, or viewer-against-NAME.html, in RUN)."),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    model: Annotated[
        bool, typer.Option("--model/--no-model", help="Load the model where patterns and words are not there yet.")
    ] = True,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and --json's output).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print file and size as JSON on standard output.")] = False,
) -> None:
    """Write a circuit as one HTML page: threshold slider, paths, attention patterns, words, a second circuit."""
    from pahq.report.progress import watch_for
    from pahq.viewing import view as write

    watch = watch_for(quiet=quiet)
    path = write(run, out, against=against, truth=truth, with_model=model, watch=watch)
    size = path.stat().st_size
    if as_json:
        print(json.dumps({"file": str(path), "bytes": size}, indent=1))
    elif not quiet:
        print(f"written: {path} ({size / 1e6:.1f} MB)")
    if open_it:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            watch.say(f"note: no browser could be started; open {path} yourself")
