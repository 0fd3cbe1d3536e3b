"""Evaluations and comparisons on the screen, and as flat rows for CSV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from pahq.report.console import make_console
from pahq.report.progress import as_time
from pahq.report.tables import Column, Row, decimals, plain, screen

FIGURES = ("metric", "recovered", "kl", "accuracy")


def area_of(record: Row, run: Row) -> Row | None:
    """The ROC of the run's group, None without a reference."""
    return next((curve for curve in record["roc"] if curve["name"] == run["group"]), None)


def flat(record: Row) -> list[Row]:
    """One row a run, figures only."""
    return [_flat_run(record, run) for run in record["runs"]]


def _flat_run(record: Row, run: Row) -> Row:
    config, area = run["config"], area_of(record, run)
    row: Row = {"name": run["name"], "run": run["run"]}
    row |= {name: config.get(name) for name in ("method", "policy", "model", "task", "threshold", "ablation")}
    row |= {name: run[name] for name in ("metric", "split", "prompts")}
    row |= {name: run["size"][name] for name in ("edges", "addition", "direct", "total")}
    for name in FIGURES:
        interval = run["circuit"].get(f"{name}_interval") or {}
        row |= {name: run["circuit"][name], f"{name}_low": interval.get("low"), f"{name}_high": interval.get("high")}
        row |= {f"full_{name}": run["full"][name], f"empty_{name}": run["empty"][name]}
        row[f"random_{name}"] = run["random"] and run["random"]["mean"][name]
    row |= {"cpr": run["cpr"], "cmd": run["cmd"]}
    for kind in ("edges", "nodes"):
        for name in ("auc", "pessimistic_auc"):
            row[f"{name}_{kind}"] = area and area[kind][name]
        for name in ("fpr", "tpr", "precision", "recall", "f1", "jaccard"):
            row[f"{name}_{kind}"] = run["reference"] and run["reference"][kind][name]
    for name in ("decisions", "spearman"):
        row[f"{name}_against"] = run["agreement"] and run["agreement"][name]
    row["incompleteness_mean"] = run["completeness"] and run["completeness"]["mean"]
    row["incompleteness_largest"] = run["completeness"] and run["completeness"]["largest"]
    row["minimality_least"] = run["minimality"] and run["minimality"]["least"]
    return row | run["cost"]


def curve_rows(record: Row) -> list[Row]:
    """One row a point of every faithfulness/size curve."""
    return [
        {"name": run["name"], "ranking": ranking} | {key: point[key] for key in ("asked", "edges", "share", *FIGURES)}
        for run in record["runs"]
        for ranking, curve in run["curves"].items()
        for point in curve
    ]


def show(record: Row, kind: str, console: Console | None = None) -> None:
    """Prints an ``evaluation`` or a ``comparison`` to ``console`` (standard output by default)."""
    console = make_console() if console is None else console
    parts = _comparison(record) if kind == "comparison" else _evaluation(record)
    parts += [Text(f"note: {note}") for note in record["notes"]]
    console.print(Group(*parts))


def _evaluation(record: Row) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for run in record["runs"]:
        parts += [*_run(run), Text()]
    if record["roc"]:
        parts.append(_roc(record["roc"]))
    return parts


def _run(run: Row) -> list[RenderableType]:
    size = run["size"]
    config = run["config"]
    parts: list[RenderableType] = [
        Text(f"{run['name']} · {config['model']} · {config['task']}", style="bold"),
        Text(
            f"{size['edges']:,} of {size['total']:,} edges ({100 * size['share']:.2g} %); "
            f"{run['prompts']} prompts, split {run['split']}"
        ),
        _behaviour(run),
    ]
    if run["cpr"] is not None:
        parts.append(Text(f"CPR {run['cpr']:.4f} (larger is better), CMD {run['cmd']:.4f} (0 is best)"))
    for ranking, curve in run["curves"].items():
        cpr, cmd = (decimals(4)(run["areas"][ranking][name]) for name in ("cpr", "cmd"))
        parts += [Text(f"edges ranked by {ranking} scores: CPR {cpr}, CMD {cmd}"), _curve(curve)]
    if run["reference"]:
        parts.append(_reference(run["reference"]))
    if run["agreement"]:
        both = run["agreement"]
        parts.append(
            Text(
                f"decisions alike {100 * both['decisions']:.2f} %; rank correlation of {both['measured']:,} effects "
                f"that both measured {decimals(4)(both['spearman'])}"
            )
        )
    return parts + _knockouts(run)


def _behaviour(run: Row) -> RenderableType:
    rows = [{"what": name, **run[name]} for name in ("full", "circuit", "empty")]
    if run["random"]:
        edges, count = run["random"]["mean"]["edges"], len(run["random"]["rows"])
        rows.insert(2, {"what": f"{count} random circuits of about {edges:.0f} edges", **run["random"]["mean"]})
    cells = [{"what": row["what"], **{name: _between(row, name) for name in FIGURES}} for row in rows]
    titles = {"metric": run["metric"], "recovered": "recovered", "kl": "KL to the full model", "accuracy": "accuracy"}
    return screen(cells, [Column("what", "", left=True), *(Column(name, title) for name, title in titles.items())])


def _between(row: Row, name: str) -> str:
    """A figure and its interval, if it has one."""
    interval = row.get(f"{name}_interval")
    show = decimals(4)
    value = show(row[name])
    return value if not interval else f"{value} [{show(interval['low'])}, {show(interval['high'])}]"


def _curve(curve: Sequence[Row]) -> RenderableType:
    columns = [Column("asked", "edges"), Column("edges", "kept"), Column("metric", "metric", decimals(4))]
    columns += [Column("recovered", "recovered", decimals(4)), Column("kl", "KL", decimals(4))]
    return screen(curve, [*columns, Column("accuracy", "accuracy", decimals(4))])


def _reference(reference: Row) -> RenderableType:
    rows = [{"what": f"{kind} of {reference['name']}"} | reference[kind] for kind in ("edges", "nodes")]
    names = {
        "precision": "precision",
        "recall": "recall",
        "f1": "F1",
        "jaccard": "Jaccard",
        "fpr": "false-positive rate",
    }
    columns = [Column(name, title, decimals(4)) for name, title in names.items()]
    return screen(rows, [Column("what", "beside", left=True), *columns])


def _knockouts(run: Row) -> list[RenderableType]:
    parts: list[RenderableType] = []
    complete, minimal = run["completeness"], run["minimality"]
    if complete:
        first = complete["rows"][0]["incompleteness"]
        rest = (
            f"; with parts knocked out, {len(complete['rows']) - 1} times: mean {complete['mean']:.4f}, "
            f"largest {complete['largest']:.4f}"
            if complete["mean"] is not None
            else ""
        )
        parts.append(Text(f"incompleteness: {first:.4f} with nothing knocked out{rest}"))
    if minimal and minimal["rows"]:
        least = ", ".join(f"{row['part']} {row['minimality']:.4f}" for row in minimal["rows"][:5])
        parts.append(
            Text(
                f"minimality: {minimal['unneeded']} of {len(minimal['rows'])} {minimal['unit']}s tried move the metric "
                f"by less than 1 % of what there is to recover; least needed: {least}"
            )
        )
    return parts


def _roc(curves: Sequence[Row]) -> RenderableType:
    rows = [
        {"name": curve["name"], "reference": curve["reference"], "points": _points(curve)}
        | {f"{kind}_{name}": curve[kind][name] for kind in ("edges", "nodes") for name in ("auc", "pessimistic_auc")}
        for curve in curves
    ]
    columns = [
        Column("name", "ROC of", left=True),
        Column("reference", "against", left=True),
        Column("points", "points"),
    ]
    for kind in ("edges", "nodes"):
        columns.append(Column(f"{kind}_auc", f"AUC {kind}", decimals(4)))
        columns.append(Column(f"{kind}_pessimistic_auc", "pessimistic", decimals(4)))
    return screen(rows, columns)


def _points(curve: Row) -> str:
    return "ranking" if curve["ranking"] else f"{curve['runs']} runs" if curve["runs"] > 1 else "1 run"


def _comparison(record: Row) -> list[RenderableType]:
    rows = []
    for run in record["runs"]:
        area = area_of(record, run)
        rows.append(
            {"name": run["name"], "edges": run["size"]["edges"], "cpr": run["cpr"], "cmd": run["cmd"], **run["cost"]}
            | {name: run["circuit"][name] for name in ("kl", "accuracy")}
            | {"work": _work(run["cost"]), "recovered": _between(run["circuit"], "recovered")}
            | {"auc": area and area["edges"]["auc"], "low": area and area["edges"]["pessimistic_auc"]}
            | {"nodes": area and area["nodes"]["auc"], "points": area and _points(area)}
        )
    first = record["runs"][0]
    columns = [Column("name", "run", left=True), Column("edges", "edges", _count)]
    if record["roc"]:
        columns += [Column("auc", "AUC edges", decimals(4)), Column("low", "pessimistic", decimals(4))]
        columns += [Column("nodes", "AUC nodes", decimals(4)), Column("points", "from")]
    columns += [Column("recovered", f"{first['metric']} recovered"), Column("kl", "KL", decimals(4))]
    columns.append(Column("accuracy", "accuracy", decimals(3)))
    if any(run["ranking"] for run in record["runs"]):
        columns += [Column("cpr", "CPR", decimals(3)), Column("cmd", "CMD", decimals(3))]
    columns += [Column("seconds", "time", _time), Column("host_bytes", "peak memory", _memory)]
    if any(run["cost"]["device_bytes"] for run in record["runs"]):
        columns.append(Column("device_bytes", "on the device", _memory))
    columns.append(Column("work", "states"))
    title = (
        f"{first['config']['model']} · {first['config']['task']} · {first['prompts']} prompts, split {first['split']}"
    )
    parts: list[RenderableType] = [Text(title, style="bold"), screen(rows, columns)]
    if 0 < len(record["agreement"]) <= 10:
        names = {"jaccard": "Jaccard", "f1": "F1", "decisions": "decisions alike", "spearman": "rank corr. of effects"}
        shown = [Column(name, title, decimals(4)) for name, title in names.items()]
        sides = [Column("a", "agreement of", left=True), Column("b", "and", left=True)]
        parts += [Text(), screen(record["agreement"], sides + shown)]
    return parts


def _work(cost: Row) -> str:
    """States evaluated, or what a method does in their place."""
    if cost["states"] is not None:
        return _count(cost["states"])
    names = {"gradients": "gradient", "steps": "step", "passes": "pass"}
    done = [f"{cost[name]:,} {names[name] if cost[name] == 1 else name}" for name in names if cost[name] is not None]
    return ", ".join(done) or plain(None)


def _count(value: Any) -> str:
    return plain(None) if value is None else f"{value:,}"


def _time(value: Any) -> str:
    if value is None:
        return plain(None)
    return f"{value:.1f} s" if value < 60 else as_time(value)


def _memory(value: Any) -> str:
    return plain(None) if value is None else f"{value / 2**30:.2f} GiB"
