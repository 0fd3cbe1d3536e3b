"""``pahq truth``: which known circuits there are, and what one consists of."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pahq.evaluation.truth import Truth


def truth(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A truth's name, interpbench:CASE or a .json file; none: list them."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the known circuits, or show the edges of one."""
    from pahq.evaluation.truth import load_truth, truth_names

    if name is None:
        _list(truth_names(), as_json)
        return
    found = load_truth(name)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        _show(found)


def _list(names: dict[str, str], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(names, indent=1))
        return
    width = max(map(len, names), default=0)
    for name, about in names.items():
        typer.echo(f"{name:<{width}}  {about}")
    typer.echo("\nAlso: interpbench:CASE (a case of InterpBench, or a folder like one), or a .json file of edges.")


def _show(truth: Truth) -> None:
    """Counts, the setting, then one line a receiver with the senders it has."""
    graph = truth.graph
    typer.echo(f"{truth.name}: {truth.about}")
    for title, fact in (("source", "source"), ("how it is known", "kind")):
        if fact in truth.facts:
            typer.echo(f"{title}: {truth.facts[fact]}")
    typer.echo(f"setting: metric {truth.metric}, ablation {truth.ablation}, {truth.n} examples, seed {truth.seed}")
    typer.echo(
        f"edges: {truth.n_edges:,} of {graph.n_edges:,} "
        f"({truth.n_addition:,} of {graph.n_addition:,} addition, {truth.n_direct:,} of {graph.n_direct:,} direct)"
    )
    for other, mask in truth.published.items():
        direct = int(mask[:, graph.direct].sum())
        total, common = int(mask.sum()), int((mask & truth.mask).sum())
        typer.echo(f"{other}: {total:,} edges ({total - direct:,} addition, {direct:,} direct), {common:,} in common")
    typer.echo("")
    for row, receiver in enumerate(graph.receivers):
        columns = truth.mask[row].nonzero()[0].tolist()
        if columns:
            typer.echo(f"{receiver.name} <- {' '.join(graph.sender_name(column) for column in columns)}")
