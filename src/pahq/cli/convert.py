"""``pahq convert``: circuits and prompts from one format to another, and what was lost on the way."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pahq.cli.output import Json, Quiet, tell
from pahq.errors import PahqError

if TYPE_CHECKING:
    from pahq.graph import Graph


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A file, or the folder of a run.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="A file (.json, .pt, .jsonl), or a folder for a circuit of pahq.")
    ],
    read_as: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Format of IN, if its content does not tell: pahq, eap-ig, eap-ig-pt, acdc, autocircuit or prompts.",
        ),
    ] = None,
    write_as: Annotated[
        str | None, typer.Option("--to", help="Format of OUT, one of the same (default: by its ending).")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model a circuit is about, where IN says too little.")] = None,
    like: Annotated[
        str | None, typer.Option(help="A run or circuit whose graph (model, kinds of edges) the circuit is to have.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Bring circuits and prompts from one format to another.

    Formats are those of EAP-IG, MIB, ACDC and AutoCircuit, and pahq's own. What a format cannot hold is listed on
    standard error, with --quiet, too.
    """
    from pahq.report.interchange import convert as run

    done = run(source, target, read_as, write_as, _graph(model, like), replace=force)
    for line in done.lost:
        print(f"not kept: {line}", file=sys.stderr)  # whatever else is printed: a loss is to be known
    what = f"circuit of {done.count:,} edges" if done.what == "circuit" else f"{done.count:,} prompt pairs"
    written = f"{target} ({what}, {done.read_as} to {done.written_as})"
    tell(asdict(done), lambda _: None, quiet=quiet, as_json=as_json, written=written)


def _graph(model: str | None, like: str | None) -> Graph | None:
    """The graph asked for, None for none; raises PahqError if both are given, or one cannot be read."""
    if model is not None and like is not None:
        raise PahqError(f"like: '{like}' and model '{model}' exclude each other; give one of them")
    if like is not None:
        from pahq.report.interchange import read_circuit

        return read_circuit(like).circuit.graph
    if model is not None:
        from pahq.graph import Graph
        from pahq.model import load_model

        return Graph(load_model(model).config)
    return None
