"""``pahq view``: a run's circuit as a page for the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pahq.cli.output import Json, Quiet, tell
from pahq.cli.running import guarded


def view(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or of a circuit.")],
    against: Annotated[Path | None, typer.Option(help="Folder of another run or circuit to lay over this one.")] = None,
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
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a circuit as one HTML page for the browser.

    With a threshold slider, paths, attention patterns, words, and a second circuit laid over it.
    """
    from pahq.report.progress import watch_for
    from pahq.viewing import view as write

    path = guarded(
        lambda how: write(run, out, against=against, truth=truth, with_model=model, watch=how["watch"]), quiet
    )
    size = path.stat().st_size
    facts = {"file": str(path), "bytes": size}
    tell(facts, lambda _: None, quiet=quiet, as_json=as_json, written=f"{path} ({size / 1e6:.1f} MB)")
    if open_it:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            watch_for(quiet=quiet).say(f"note: no browser could be started; open {path} yourself")
