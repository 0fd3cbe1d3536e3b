"""A finished run on one screen."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pahq.evaluation.circuit import Circuit
from pahq.report import precision
from pahq.report.console import make_console
from pahq.report.progress import as_time
from pahq.report.tables import decimals


def show(circuit: Circuit, record: dict[str, Any] | None, console: Console | None = None) -> None:
    """Prints size, behaviour, work done and the ten largest edges to ``console`` (standard output by default)."""
    console = make_console() if console is None else console
    console.print(summary(circuit, record), highlight=False)


def summary(circuit: Circuit, record: dict[str, Any] | None) -> RenderableType:
    """The screen as a rich renderable. ``record``: the content of ``run.json``; None for a circuit without a run."""
    if record is None:
        return _alone(circuit)
    config = record["config"]
    names = [config[name] for name in ("method", "model", "task", "metric")]
    title = Text(" · ".join([*names, _choice(record)]), style="bold")
    scored = "selection" in record["search"]
    work = _scoring(record) if scored else _work(record)
    parts: list[RenderableType] = [title, _size(circuit), _behaviour(circuit, config["metric"])]
    if circuit.n_edges and not circuit.is_connected:
        lower = "keep more edges" if scored else "take a lower threshold"
        parts.append(Text(f"note: no path of kept edges leads from the embedding to the logits; {lower}"))
    parts += [*_prefilter(record, config["metric"]), work]
    return Group(*parts, *precision.screen(record), _largest(circuit, scored))


def as_json(circuit: Circuit, record: dict[str, Any] | None) -> dict[str, Any]:
    """The same figures for programs."""
    facts = circuit.to_json()
    names = ("config", "size", "figures")
    if record is None:
        found = {name: facts[name] for name in names if name in facts}
        return found | {"largest_edges": [edge._asdict() for edge in circuit.largest()]}
    return {
        **{name: facts[name] for name in names},
        "search": record["search"],
        **{name: record[name] for name in ("prefilter",) if name in record},
        "precision": record["precision"],
        "total_seconds": record["total_seconds"],
        "peak_memory": record["peak_memory"],
        "largest_edges": [edge._asdict() for edge in circuit.largest()],
    }


def _alone(circuit: Circuit) -> RenderableType:
    """Of a circuit without a run: all that can be known."""
    title = Text(f"{circuit.graph.config.name} · a circuit without a run", style="bold")
    return Group(title, _size(circuit), _largest(circuit, scored=circuit.n_tested == 0))


def _size(circuit: Circuit) -> RenderableType:
    graph = circuit.graph
    kept, total = circuit.n_edges, graph.n_edges
    return Text(
        f"kept {kept:,} of {total:,} edges ({100 * kept / total:.2g} %): {circuit.n_addition:,} of "
        f"{graph.n_addition:,} addition, {circuit.n_direct:,} of {graph.n_direct:,} direct"
    )


def _behaviour(circuit: Circuit, metric: str) -> RenderableType:
    table = Table("prompts", "", metric, "accuracy", "logit difference", box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for split in ("validation", "test"):
        figures = circuit.metadata.get("figures", {}).get(split, {})
        if "missing" in figures:
            table.add_row(split, Text(f"none: {figures['missing']}"))
            continue
        for name in ("full", "circuit", "corrupted"):
            if name in figures:
                row = figures[name]
                label = f"{split} ({figures['prompts']})" if name == "full" else ""
                values = (row["metric"], row["accuracy"], row["logit_difference"])
                table.add_row(label, name, *map(decimals(4), values))
    return table


def _choice(record: dict[str, Any]) -> str:
    """By what edges stay: the last part of the title."""
    config, selection = record["config"], record["search"].get("selection")
    if selection is None:
        return f"threshold {config['threshold']:g}"
    if selection["rule"] != "threshold":
        return f"{selection['rule']} {selection['edges']:,} edges"
    own = " (the method's own)" if config["threshold"] is None else ""
    return f"score of at least {selection['threshold']:g}{own}"


def _scoring(record: dict[str, Any]) -> RenderableType:
    """The work of a method that scores edges."""
    search = record["search"]
    stats = [f"{name} {value:,}" for name, value in search["stats"].items() if isinstance(value, int)]
    lines = [
        f"all edges scored in {as_time(search['seconds'])}; whole run {as_time(record['total_seconds'])}"
        + (f", resumed {search['resumes']}×" if search["resumes"] else "")
        + (f"; {', '.join(stats)}" if stats else ""),
        *(f"note: {note}" for note in search["notes"]),
        f"peak memory {_peak(record['peak_memory'])}",
    ]
    return Text("\n".join(lines))


def _prefilter(record: dict[str, Any], metric: str) -> list[RenderableType]:
    """What a prefilter left and what that cost; nothing for a run without one."""
    facts = record.get("prefilter")
    if facts is None:
        return []
    faithful = "" if facts["faithfulness"] is None else f", faithfulness {facts['faithfulness']:.3f}"
    order = ", senders tested from the least score up" if facts["order_by_score"] else ""
    text = (
        f"prefilter {facts['method']}: {100 * facts['share_filtered']:.1f} % of the edges removed beforehand, "
        f"{facts['edges_left']:,} left to sweep{order}; {metric} {decimals(4)(facts['metric'])}{faithful} before the "
        f"sweep; scored in {as_time(facts['seconds'])}"
    )
    return [Text("\n".join([text, *(f"note: {note}" for note in facts["notes"])]))]


def _work(record: dict[str, Any]) -> RenderableType:
    search = record["search"]
    states, wasted = search["states"], search["wasted"]
    lines = [
        f"{search['tests']:,} edges tested in {as_time(search['seconds'])}, {states:,} states evaluated, "
        f"{100 * wasted / max(states, 1):.1f} % of them wasted; whole run {as_time(record['total_seconds'])}"
        + (f", resumed {search['resumes']}×" if search["resumes"] else ""),
        f"{search['flops_total'] / 1e12:.3g} TFLOP at {search['flops_per_second'] / 1e9:.3g} GFLOP/s, "
        f"{100 * search['share_of_peak']:.0f} % of this machine's {search['peak_flops_per_second'] / 1e9:.0f}: "
        + _shares(search["flops"]),
        f"peak memory {_peak(record['peak_memory'])}",
    ]
    return Text("\n".join(lines))


def _peak(peak: dict[str, int]) -> str:
    host = f"{peak['host_bytes'] / 2**30:.2f} GiB"
    return (
        f"{host} on the host, {peak['device_bytes'] / 2**30:.2f} GiB on the device" if "device_bytes" in peak else host
    )


def _shares(flops: dict[str, int]) -> str:
    total = max(sum(flops.values()), 1)
    ranked = sorted(flops.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in ranked)


def _largest(circuit: Circuit, scored: bool) -> RenderableType:
    """scored: whether what stands in the place of effects are a method's scores."""
    table = Table("largest edges", "", "", "score" if scored else "effect", box=None, pad_edge=False)
    table.columns[3].justify = "right"
    for edge in circuit.largest():
        table.add_row(edge.sender, "→", edge.receiver, f"{edge.effect:.4f}")
    return table
