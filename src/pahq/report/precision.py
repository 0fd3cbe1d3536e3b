"""How a run fared under its precision policy, for ``run.json`` and for the screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pahq.method.acdc import Acdc, AcdcResult
from pahq.precision.store import Held

NAMED = 3
"""Disagreements that the screen names."""


def precision_record(acdc: Acdc, result: AcdcResult, exact_states: int, check: dict[str, Any] | None) -> dict[str, Any]:
    """What ``run.json`` says about precision once a sweep has ended.

    exact_states, check: of all processes that took part. Counts of decisions and the error model need no help
    there, for the journal gives a resumed run the earlier decisions.
    """
    policy = acdc.options.policy
    record = {
        "policy": policy.to_dict(),
        "exact": acdc.options.escalates,
        **result.stats["precision"],
        "exact_states": exact_states,
        "margin": _margin(acdc) if policy.differences else None,
        "check": check,
    }
    held = [*acdc.engine.store.masters(), *acdc.engine.store.held()]
    return record | {
        "weights": [
            {"component": one.component, "format": one.format, "place": one.place, "bytes": one.nbytes} for one in held
        ],
        "weight_bytes": {place: _sum(held, place) for place in ("host", "device")},
    }


def _margin(acdc: Acdc) -> dict[str, Any]:
    """The margin in use at the end: how it grows with an edge's movement, and what it is for a typical edge.

    typical: at the median movement of the edges measured both ways, None where there are none.
    """
    margin, metric = acdc.measurer.margin, acdc.engine.base_metric
    noise, one = margin.of(np.array([0.0, 1.0]), metric).tolist()
    moved = [decision.moved for decision in acdc.decisions if decision.moved]
    typical = float(margin.of(np.array([np.median(moved)]), metric)[0]) if moved else None
    return {"noise": noise, "per_movement": one - noise, "typical": typical}


def merged_check(
    earlier: Sequence[dict[str, Any]], replayed: int, largest: float, now: dict[str, Any]
) -> dict[str, Any]:
    """The figures of a check that went on over several processes.

    earlier: disagreements among the ``replayed`` decisions of earlier processes; largest: their largest error.
    """
    found = [*earlier, *now["disagreements"]]
    return now | {
        "checked": replayed + now["checked"],
        "disagreements": found,
        "within_noise": sum(bool(one["within_noise"]) for one in found),
        "largest_error": max(largest, now["largest_error"]),
    }


def screen(record: dict[str, Any]) -> list[RenderableType]:
    """The part of a summary about precision; one line for plain FP32. ``record``: the content of ``run.json``."""
    facts = record["precision"]
    if isinstance(facts, str):  # a run from before there were policies
        return []
    formats = {name for name in facts["policy"]["formats"].values() if name != "fp32"}
    if "weights" not in facts:  # scores, not a sweep
        return [Text(_policy(facts))] if formats else []
    check = [] if facts["check"] is None else [_check(facts["check"])]
    if not formats:
        total = sum(facts["weight_bytes"].values())
        dtype = {"float32": "FP32", "float64": "FP64"}[record["config"]["dtype"]]
        return [*check, Text(f"weights {total / 2**20:,.1f} MiB in {dtype}")]
    return [Text(_policy(facts)), Text(_decided(facts, record["search"]["tests"])), *check, _weights(facts)]


def _policy(facts: dict[str, Any]) -> str:
    policy = facts["policy"]
    kinds: dict[str, list[str]] = {}
    for kind, name in policy["formats"].items():
        kinds.setdefault(name, []).append(kind)
    table = "; ".join(f"{', '.join(names)} in {fmt}" for fmt, names in kinds.items() if fmt != "fp32")
    under = {
        "none": "nothing under test in FP32",
        "sender": "the sending head in FP32",
        "receiver": "the receiving head in FP32",
        "both": "sending and receiving head in FP32",
    }[policy["under_test"]]
    return f"policy {policy['name']}: {table}; {policy['quantised']} quantised, {under}"


def _decided(facts: dict[str, Any], tests: int) -> str:
    parts = [
        f"{facts['refined']:,} of {tests:,} decisions in FP32 ({100 * facts['refined_share']:.2g} %)"
        if facts["exact"]
        else "no decision in FP32"
    ]
    if facts["measured_both_ways"]:
        parts.append(f"largest error seen {facts['largest_error']:.2g}")
    margin = facts["margin"]
    if facts["exact"] and margin is not None:
        typical = "" if margin["typical"] is None else f", ±{margin['typical']:.2g} for a typical edge"
        parts.append(f"margin {margin['per_movement']:.2g} × movement + {margin['noise']:.2g}{typical}")
    return "; ".join(parts)


def _check(check: dict[str, Any]) -> Text:
    beyond = [one for one in check["disagreements"] if not one["within_noise"]]
    text = (
        f"check: {len(beyond):,} of {check['checked']:,} decisions differ from FP32's, "
        f"{check['within_noise']:,} more within FP32's own rounding noise; largest error {check['largest_error']:.2g}"
    )
    if beyond:
        names = [f"{one['edge']} ({one['effect']:.3g}, in FP32 {one['fp32_effect']:.3g})" for one in beyond[:NAMED]]
        text += f"\n  {', '.join(names)}{', …' if len(beyond) > NAMED else ''}"
    return Text(text)


def _weights(facts: dict[str, Any]) -> Table:
    """MiB by component, a column for each format and place."""
    held = {(one["component"], one["format"], one["place"]): one["bytes"] for one in facts["weights"]}
    columns = list(dict.fromkeys((fmt, place) for _, fmt, place in held))
    table = Table("weights, MiB", *(f"{fmt}, {place}" for fmt, place in columns), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for component in dict.fromkeys(component for component, _, _ in held):
        cells = [held.get((component, *column)) for column in columns]
        table.add_row(component, *("" if cell is None else _mib(cell) for cell in cells))
    table.add_row("total", *(_mib(sum(held.get((c, *at), 0) for c in {c for c, _, _ in held})) for at in columns))
    return table


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.2f}"


def _sum(held: Sequence[Held], place: str) -> int:
    return sum(one.nbytes for one in held if one.place == place)
