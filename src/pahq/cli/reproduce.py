"""``pahq reproduce``: the published comparison, run again and put beside what was published."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pahq.cli.codes import PARTLY
from pahq.cli.output import Json, Quiet, tell
from pahq.cli.running import guarded

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from pahq.report.tables import Column, Row

reproduce_app = typer.Typer(help="Run the published comparison again, beside its figures.", no_args_is_help=True)

Offline = Annotated[
    bool, typer.Option("--offline", help="Take stand-ins that come with pahq, not the paper's models from the hub.")
]
Quick = Annotated[bool, typer.Option("--quick", help="A small grid, to see that all works.")]
Number = Annotated[int | None, typer.Option("--n", "-n", help="Number of prompts (default: the paper's).")]
Seed = Annotated[int, typer.Option(help="Seed that draws the prompts.")]
Thresholds = Annotated[
    str | None,
    typer.Option(help="pahq (0.001, 0.005, 0.01), acdc (its 21 or 31) or numbers such as 0.1,0.01."),
]
Methods = Annotated[str | None, typer.Option(help="Rows, such as acdc,pahq,rtn,eap (default: the paper's).")]
Model = Annotated[str | None, typer.Option(help="In place of gpt2 (offline: smollm2-135m).")]
Task = Annotated[str | None, typer.Option(help="In place of ioi.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …")]
Out = Annotated[str | None, typer.Option(help="Folder of runs, JSON and CSV (default: runs/NAME). Finished runs stay.")]


@reproduce_app.command()
def table_auc(
    offline: Offline = False,
    quick: Quick = False,
    tasks: Annotated[str | None, typer.Option(help="Any of docstring,greaterthan,ioi (default: all).")] = None,
    truths: Annotated[
        str | None, typer.Option(help="With --offline: known circuits with a model (default: all trained ones).")
    ] = None,
    metrics: Annotated[str, typer.Option(help="kl, task, or both.")] = "kl,task",
    methods: Methods = None,
    thresholds: Thresholds = None,
    n: Number = None,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(help="Steps of trained masks (default: the methods' own).")] = None,
    device: Device = "cpu",
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """AUC of every method against the known circuits.

    By task and metric.
    """
    options = _words(locals(), ("tasks", "truths", "metrics", "methods"))
    options["kinds"] = options.pop("metrics")

    def run(how: Any, **rest: Any) -> Row:
        from pahq.reproduction.tables import table_auc

        return table_auc(how=how, **rest)

    _finish("table-auc", options, run, out, quiet, as_json)


@reproduce_app.command()
def table_runtime(
    offline: Offline = False,
    quick: Quick = False,
    model: Model = None,
    task: Task = None,
    thresholds: Annotated[str | None, typer.Option(help="One threshold (default: 0.01, offline 0.05).")] = None,
    n: Number = None,
    seed: Seed = 0,
    device: Device = "cpu",
    one_process: Annotated[
        bool, typer.Option("--one-process", help="All runs in this process: peak memory then adds up.")
    ] = False,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Minutes and memory of ACDC and PAHQ on IOI."""
    options = _words({k: v for k, v in locals().items() if k != "one_process"}, ())

    def run(how: Any, **rest: Any) -> Row:
        from pahq.reproduction.tables import table_runtime

        return table_runtime(how=how, separate=not one_process, **rest)

    _finish("table-runtime", options, run, out, quiet, as_json)


@reproduce_app.command()
def table_ablation(
    offline: Offline = False,
    quick: Quick = False,
    model: Model = None,
    task: Task = None,
    thresholds: Annotated[str | None, typer.Option(help="One threshold of the engine's runs, on a GPU.")] = None,
    n: Number = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """What each of the three streams gains.

    Measured on a GPU, modelled elsewhere.
    """
    options = _words(locals(), ())

    def run(how: Any, **rest: Any) -> Row:
        from pahq.reproduction.ablation import table_ablation

        return table_ablation(how=how, **rest)

    _finish("table-ablation", options, run, out, quiet, as_json)


@reproduce_app.command()
def figure_rtn(
    offline: Offline = False,
    quick: Quick = False,
    model: Model = None,
    task: Task = None,
    methods: Annotated[str | None, typer.Option(help="Any of acdc,pahq,pahq-values,rtn (default: all).")] = None,
    thresholds: Thresholds = None,
    n: Number = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """What rounding everything does to FP32's circuit.

    Edges kept, AUC, effects that are exactly zero.
    """
    options = _words(locals(), ("methods",))

    def run(how: Any, **rest: Any) -> Row:
        from pahq.reproduction.tables import figure_rtn

        return figure_rtn(how=how, **rest)

    _finish("figure-rtn", options, run, out, quiet, as_json)


@reproduce_app.command()
def gpt2_ioi(
    quick: Quick = False,
    model: Model = None,
    task: Task = None,
    thresholds: Annotated[str | None, typer.Option(help="Any of 0.0251,0.01,0.001,0.0001 (default: all).")] = None,
    n: Number = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Sizes and KL of GPT-2's IOI circuits beside ACDC's.

    Exit code 3 where one lies outside of what is published.
    """
    options = _words(locals(), ())

    def run(how: Any, **rest: Any) -> Row:
        from pahq.reproduction.tables import gpt2_ioi

        return gpt2_ioi(how=how, **rest)

    record = _finish("gpt2-ioi", options, run, out, quiet, as_json)
    if any(row["within"] is False for row in record["rows"]):
        raise typer.Exit(PARTLY)


def _words(given: dict[str, Any], lists: tuple[str, ...]) -> dict[str, Any]:
    """The options of a grid among a command's arguments; those of ``lists`` as tuples of words."""
    kept = {name: value for name, value in given.items() if name not in ("out", "quiet", "as_json")}
    for name in lists:
        if kept[name] is None:
            kept.pop(name)
        else:
            kept[name] = tuple(word for word in kept[name].split(",") if word)
    return kept


def _finish(
    name: str, options: dict[str, Any], run: Callable[..., Row], out: str | None, quiet: bool, as_json: bool
) -> Row:
    """Runs, prints, names the folder. Ctrl-C leaves the finished runs, with which the same command goes on."""
    from pahq.reproduction.settings import GridOptions

    folder = f"runs/{name}" if out is None else out
    record = guarded(
        lambda how: run(GridOptions(**options), out=folder, **how),
        quiet,
        lambda: f"the same command goes on with the runs in {folder}",
    )
    tell(record, lambda console: _show(console, record), quiet=quiet, as_json=as_json, written=folder)
    return record


def _show(console: Console, record: Row) -> None:
    from pahq.report.tables import Column, decimals, known, mebibytes, number, screen

    three, two, digits, share = decimals(3), decimals(2), number(3), known(lambda part: f"{100 * part:.1f} %")
    shows: dict[str, Callable[[Any], str]] = {"minutes": two, "share_of_acdc": two, "paper_share": two}
    shows |= {"ms_per_test": digits, "threshold": number(4), "test_kl": three, "ms_per_edge": three, "times_all": two}
    shows |= {"paper_times_all": two, "engine_minutes": two, "seconds": digits, "zero_effects": share}
    shows |= dict.fromkeys(("weight_bytes", "host_bytes", "device_bytes"), known(mebibytes))
    shows |= dict.fromkeys(("kept_of_fp32", "precision", "same_decisions"), share)
    shows |= {"rank_correlation": three, "paper_memory_share": two}

    for part in ("rows", "auc"):
        rows = record.get(part)
        if rows:
            columns = [_column(key, shows.get(key, three if "auc" in key else None), Column) for key in rows[0]]
            console.print(screen(rows, columns))
    for cell, reason in record["failures"].items():
        console.print(f"failed: {cell}: {reason}")
    about = record.get("about", {})
    if about:
        console.print(", ".join(f"{key} {value}" for key, value in about.items() if key in _TOLD))
    if "tolerance" in record:
        tolerance = record["tolerance"]
        console.print(f"within: {tolerance['edges']:.0%} of the edges and {tolerance['kl']:.0%} of the KL published")
    console.print(record["paper"])


_TOLD = ("model", "task", "threshold", "reference_threshold", "how", "batch", "tokens", "edges")


def _column(key: str, show: Callable[[Any], str] | None, make: type[Column]) -> Column:
    title = key.replace("_bytes", ", MiB").replace("pessimistic", "pess.").replace("_", " ").replace("auc", "AUC")
    if show is None or key == "paper_auc_edges":  # words, or figures as they are
        return make(key, title, left=key in ("setting", "method", "metric", "streams"))
    return make(key, title, show)
