"""``pahq truth``: which known circuits there are, and what one consists of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pahq.cli.output import Json, Quiet, tell

if TYPE_CHECKING:
    from rich.console import Console

    from pahq.evaluation.truth import Truth


def truth(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A truth's name, interpbench:CASE or a .json file; none: list them."),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List the known circuits, or show the edges of one."""
    from pahq.evaluation.truth import load_truth, truth_names

    if name is None:
        names = truth_names()
        tell(names, lambda console: _list(console, names), quiet=quiet, as_json=as_json)
        return
    found = load_truth(name)
    tell(found.to_json(), lambda console: _show(console, found), quiet=quiet, as_json=as_json)


def _list(console: Console, names: dict[str, str]) -> None:
    console.soft_wrap = True
    width = max(map(len, names), default=0)
    for name, about in names.items():
        console.print(f"{name:<{width}}  {about}")
    console.print("\nAlso: interpbench:CASE (a case of InterpBench, or a folder like one), or a .json file of edges.")


def _show(console: Console, truth: Truth) -> None:
    """Counts, the setting, then one line a receiver with the senders it has."""
    from pahq.evaluation.truth.base import OWN

    console.soft_wrap = True  # a receiver is a line, however many senders it has
    graph = truth.graph
    console.print(f"{truth.name}: {truth.about}")
    for title, fact in (("source", "source"), ("how it is known", "kind")):
        if fact in truth.facts:
            console.print(f"{title}: {truth.facts[fact]}")
    console.print(f"setting: metric {truth.metric}, ablation {truth.ablation}, {truth.n} examples, seed {truth.seed}")
    console.print(
        f"edges: {truth.n_edges:,} of {graph.n_edges:,} "
        f"({truth.n_addition:,} of {graph.n_addition:,} addition, {truth.n_direct:,} of {graph.n_direct:,} direct)"
    )
    if truth.name.startswith(OWN):
        console.print(f"search it: {command_of(truth)}")
    for other, mask in truth.published.items():
        direct = int(mask[:, graph.direct].sum())
        total, common = int(mask.sum()), int((mask & truth.mask).sum())
        console.print(
            f"{other}: {total:,} edges ({total - direct:,} addition, {direct:,} direct), {common:,} in common"
        )
    console.print("")
    for row, receiver in enumerate(graph.receivers):
        columns = truth.mask[row].nonzero()[0].tolist()
        if columns:
            console.print(f"{receiver.name} <- {' '.join(graph.sender_name(column) for column in columns)}")


def command_of(truth: Truth) -> str:
    """How a circuit of the truth's own model is looked for in its setting."""
    task = truth.name if truth.get_task is not None else "TASK"
    words = ["pahq discover --model", truth.name, "--task", task, "--threshold 0.01 --metric", truth.metric]
    words += ["-n", str(truth.n)]
    words += ["--ablation", truth.ablation] if truth.ablation != "resample" else []
    words += ["--seed", str(truth.seed)] if truth.seed else []
    for option, value in truth.graph.options().items():
        if value != (option != "split_pos"):
            words.append(f"--{'' if value else 'no-'}{option.replace('_', '-')}")
    return " ".join(words)
