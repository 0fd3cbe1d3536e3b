"""``pahq policies``, and ``pahq precision``: what low precision does to a model's edges."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pahq.cli.options import task_options
from pahq.cli.output import Json, Quiet, tell
from pahq.cli.running import guarded
from pahq.errors import PahqError
from pahq.report.config import CHOICES, RunConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from pahq.report.tables import Column

precision_app = typer.Typer(help="What low precision does to a model's edges.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="smollm2-135m, a hub id, a local folder, or a .gguf file.")]
Task = Annotated[str, typer.Option(help="A task's name (see 'pahq tasks') or a JSONL or CSV file of prompts.")]
Policy = Annotated[str, typer.Option(help="A policy's name (see 'pahq policies'), a table, or a .json file.")]
UnderTest = Annotated[
    str | None, typer.Option(help=f"Heads in FP32: {' or '.join(CHOICES['under_test'])} (default: the policy's).")
]
Metric = Annotated[str | None, typer.Option(help="kl_div, logit_diff, … (default: the task's own).")]
Ablation = Annotated[str, typer.Option(help=" or ".join(CHOICES["ablation"]))]
Number = Annotated[int, typer.Option("--n", "-n", help="Number of prompts.")]
Seed = Annotated[int, typer.Option(help="Seed that draws the prompts (and the edges, where they are drawn).")]
Threshold = Annotated[float, typer.Option(help="Decisions compared are: effect below this or not.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …")]
TaskOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="An option of the task, such as templates=8; repeat for more."),
]
Out = Annotated[str | None, typer.Option(help="Folder for CSV, plot and run.json (default: runs/precision-…).")]


def policies(quiet: Quiet = False, as_json: Json = False) -> None:
    """List the precision policies and the number formats."""
    from pahq.precision.formats import FORMATS
    from pahq.precision.policy import POLICIES

    known = [policy.to_dict() | {"about": about} for policy, about in POLICIES.values()]
    formats = [
        {"name": f.name, "bits": f.bits, "scaled": f.scaled, "largest": f.largest, "about": f.about}
        for f in FORMATS.values()
    ]
    tell({"policies": known, "formats": formats}, _show_policies, quiet=quiet, as_json=as_json)


def _show_policies(console: Console) -> None:
    from rich.console import Group

    from pahq.precision.formats import FORMATS
    from pahq.precision.policy import KINDS, POLICIES
    from pahq.report.tables import Column, screen

    shown = {"attention": ("q", "k", "v", "o"), "mlp": ("mlp",), "unembed": ("unembed",), "embed": ("embed",)}
    shown |= {"norm": ("norm",), "rest": ("residual", "softmax", "metric")}
    rows = []
    for policy, about in POLICIES.values():
        row: dict[str, Any] = {"name": policy.name, "about": about}
        for title, kinds in shown.items():
            names = dict.fromkeys(policy.format(kind).name for kind in kinds)
            row[title] = " ".join(names).replace("e4m3-unscaled", "e4m3u")
        row["quantised"] = "–" if policy.is_fp32 else policy.quantised
        row["tested"] = "–" if policy.is_fp32 else policy.under_test
        rows.append(row)
    assert {kind for kinds in shown.values() for kind in kinds} == set(KINDS)
    formats = [
        {"name": f.name, "bits": f.bits, "scale": "by row" if f.scaled else "–", "about": f.about}
        | {"largest": "as FP32" if f.largest is None else f"{f.largest:g}"}
        for f in FORMATS.values()
    ]
    titles = ("name", *shown, "quantised", "tested")
    table = screen(rows, [Column(key, "policy" if key == "name" else key, left=True) for key in titles])
    notes = (
        "rest: residual sums, softmax, metric. tested: heads of the edge under test that stay FP32 (--under-test). "
        "e4m3u: e4m3-unscaled."
    )
    own = "Your own table: --policy attention=e4m3,mlp=int8 (values:… rounds values), or a JSON file."
    abouts = screen(rows, [Column("name", "policy", left=True), Column("about", "", left=True)])
    of_format = [Column("name", "format", left=True), Column("bits", "bits"), Column("scale", "scaled", left=True)]
    of_format += [Column("largest", "largest"), Column("about", "", left=True)]
    console.print(Group(table, notes, "", abouts, own, "", screen(formats, of_format)))


@precision_app.command()
def snr(
    model: Model,
    task: Task,
    policy: Policy = "pahq",
    edge: Annotated[
        str | None, typer.Option(help="Such as 'a3.2->a7.1.q' (default: a strong one that many layers follow).")
    ] = None,
    under_test: UnderTest = None,
    metric: Metric = None,
    n: Number = 8,
    seed: Seed = 0,
    ablation: Ablation = "resample",
    device: Device = "cpu",
    task_option: TaskOption = None,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """What low precision leaves of an edge's signal, in dB.

    The signal is the change that removing the edge makes, on its way through later layers.
    """
    config = _config(locals())
    folder = _folder("snr", config, policy) if out is None else out

    from pahq import study

    record = guarded(lambda how: study.snr(config, folder, edge, **how), quiet)
    _finish(record, folder, quiet, as_json, _show_snr)


@precision_app.command()
def sensitivity(
    model: Model,
    task: Task,
    threshold: Threshold = 0.01,
    formats: Annotated[str, typer.Option(help="Formats to try, separated by commas.")] = "bf16,e4m3,e5m2,int8",
    kinds: Annotated[
        str | None, typer.Option(help="Component kinds such as q,k,v,o,mlp,norm (default: all, see 'pahq policies').")
    ] = None,
    quantised: Annotated[
        str, typer.Option(help="differences, values or both (what is no product is always rounded as values).")
    ] = "differences",
    budget: Annotated[
        str | None,
        typer.Option(
            help="For the recommended table: bytes, or a share of FP32's such as 0.4x "
            "(default: half of FP32's, or the least that the formats take)."
        ),
    ] = None,
    tests: Annotated[int, typer.Option(help="Effects to compare, sampled evenly over an FP32 sweep.")] = 400,
    run: Annotated[
        str | None,
        typer.Option(help="A finished run on the same model and prompts: its sweep and options count, none is made."),
    ] = None,
    absolute: Annotated[bool, typer.Option("--absolute", help="Compare |effect| with the threshold.")] = False,
    metric: Metric = None,
    n: Number = 8,
    seed: Seed = 0,
    ablation: Ablation = "resample",
    device: Device = "cpu",
    task_option: TaskOption = None,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Which component bears which format.

    Agreement with FP32, bytes and time of each, and a recommended table for a budget.
    """
    config = _config(locals())
    folder = _folder("sensitivity", config, quantised) if out is None else out
    chosen = None if kinds is None else _list(kinds)

    from pahq import study

    record = guarded(
        lambda how: study.sensitivity(config, folder, chosen, _list(formats), quantised, tests, budget, run, **how),
        quiet,
    )
    _finish(record, folder, quiet, as_json, _show_sensitivity)


@precision_app.command()
def groups(
    model: Model,
    task: Task,
    policy: Policy = "pahq-values",
    threshold: Threshold = 0.01,
    heads: Annotated[int | None, typer.Option(help="Heads drawn, into which edges are scored (default: 8).")] = None,
    tests: Annotated[int, typer.Option(help="Edges scored.")] = 64,
    sizes: Annotated[
        str | None, typer.Option(help="Heads in FP32 at a time, such as 0,1,4 (default: 0, 1, 2, 4, … and all).")
    ] = None,
    metric: Metric = None,
    n: Number = 8,
    seed: Seed = 0,
    ablation: Ablation = "resample",
    device: Device = "cpu",
    task_option: TaskOption = None,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """How many heads in FP32 at a time are worth it.

    Scores many edges at once; heads held in FP32 against memory, time and agreement.
    """
    config = _config(locals())
    folder = _folder("groups", config, policy) if out is None else out
    chosen = None if sizes is None else _integers(sizes)

    from pahq import study

    record = guarded(lambda how: study.groups(config, folder, heads, tests, chosen, **how), quiet)
    _finish(record, folder, quiet, as_json, _show_groups)


def _config(given: dict[str, Any]) -> RunConfig:
    """The options of a run among a command's own (a study without decisions has no threshold)."""
    options = {name: value for name, value in given.items() if name in RunConfig.__dataclass_fields__}
    return RunConfig(**{"threshold": 0.0, **options}, task_options=task_options(given["task_option"] or []))


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _integers(text: str) -> list[int]:
    try:
        return [int(item) for item in _list(text)]
    except ValueError:
        raise PahqError(f"sizes '{text}' are not whole numbers; write for example 0,1,4") from None


def _folder(study: str, config: RunConfig, *more: str) -> str:
    parts = ("precision", study, Path(config.model).stem, Path(config.task).stem, *more)
    return str(Path("runs") / re.sub(r"[^\w.-]+", "_", "-".join(parts)))


def _finish(
    record: dict[str, Any], folder: str, quiet: bool, as_json: bool, show: Callable[[Console, dict[str, Any]], None]
) -> None:
    tell(
        record,
        lambda console: show(console, record["figures"]),
        quiet=quiet,
        as_json=as_json,
        written=folder,
    )


def _print(
    console: Console,
    rows: Sequence[dict[str, Any]],
    columns: Sequence[Column],
    before: str = "",
    after: str = "",
) -> None:
    from pahq.report.tables import screen

    if before:
        console.print(before, style="bold")
    console.print(screen(rows, columns))
    if after:
        console.print(after)


def _show_snr(console: Console, figures: dict[str, Any]) -> None:
    from pahq.report.tables import Column, decimals, number

    names = list(figures["effects"])[1:] or ["fp32"]
    cells: dict[str, dict[str, Any]] = {}
    for row in figures["rows"]:
        cell = cells.setdefault(row["point"], {"point": row["point"], "signal": row["signal"]})
        cell[row["variant"]] = row["snr_db"]
        cell[f"{row['variant']} read"] = row["snr_db_read"]
    columns = [Column("point", "read by", left=True), Column("signal", "signal", number(3))]
    columns += [Column(name, f"({i})", decimals(1)) for i, name in enumerate(names, 1)]
    columns += [Column(f"{name} read", f"({i}) read", decimals(1)) for i, name in enumerate(names, 1)]
    key = [f"({i}) {name}: effect {figures['effects'][name]:.4g}" for i, name in enumerate(names, 1)]
    _print(
        console,
        list(cells.values()),
        columns,
        f"{figures['edge']}: effect {figures['effects']['fp32']:.4g} in FP32 ({figures['why']})",
        "signal to noise in dB over all positions, and at those that the metric reads (read); a3: layer 3's "
        "attention, m3: its MLP\n" + "\n".join(key),
    )


def _agreement() -> list[Column]:
    from pahq.report.tables import Column, decimals, number, percent

    return [
        Column("decisions", "decisions", percent),
        Column("spearman", "rank corr.", decimals(5)),
        Column("error_median", "median error", number(2)),
        Column("error_99", "99 %", number(2)),
    ]


def _show_sensitivity(console: Console, figures: dict[str, Any]) -> None:
    from pahq.report.tables import Column, decimals, mebibytes

    names = [Column("kind", "component", left=True), Column("format", "format", left=True)]
    names.append(Column("quantised", "quantised", left=True))
    cost = [Column("bytes", "weights, MiB", mebibytes), Column("time_ratio", "time / FP32", decimals(2))]
    _print(
        console,
        figures["rows"],
        [*names, *_agreement(), *cost],
        f"{figures['tests']:,} of {figures['sweep_tests']:,} tests of an FP32 sweep; FP32 weights "
        f"{mebibytes(figures['fp32_bytes'])} MiB",
    )
    rows = [{"name": choice["quantised"], **choice["measured"]} for choice in figures["choices"]]
    tables = [
        f"{choice['quantised']}: "
        + (", ".join(f"{kind}={name}" for kind, name in choice["formats"].items()) or "FP32 throughout")
        + f" ({mebibytes(choice['bytes'])} of {mebibytes(choice['budget'])} MiB)"
        for choice in figures["choices"]
    ]
    console.print()
    _print(
        console,
        rows,
        [Column("name", "recommended", left=True), *_agreement(), *cost],
        after="\n".join(tables) + "\nrule: from FP32, always the change that adds least squared error for each byte "
        "saved, until the budget is met, then what takes most error away and still fits; measured again as a whole",
    )


def _show_groups(console: Console, figures: dict[str, Any]) -> None:
    from pahq.report.tables import Column, decimals, mebibytes

    columns = [Column("quantised", "quantised", left=True), Column("group", "FP32 heads"), Column("passes", "passes")]
    columns += [Column("bytes_high", "their MiB", mebibytes), Column("bytes", "all weights", mebibytes)]
    columns += [Column("seconds_base", "base s", decimals(2)), Column("seconds_scoring", "scoring s", decimals(2))]
    _print(
        console,
        figures["rows"],
        [*columns, *_agreement()],
        f"{figures['edges']} edges into {len(figures['heads'])} heads, each removed from the full model; FP32: "
        f"{mebibytes(figures['fp32_bytes'])} MiB, {figures['fp32_seconds']:.2f} s",
    )
