"""From a folder and what was asked for to a tracker with its sinks; and what a run hands to it at its end."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pahq.evaluation.circuit import Circuit
from pahq.files import naming
from pahq.report import machine
from pahq.report.tracking.event import Sink, Table
from pahq.report.tracking.jsonl import EVENTS_FILE, Jsonl
from pahq.report.tracking.settings import TRACKING_FILE, Tracking, read_kept, write_kept
from pahq.report.tracking.tracker import Tracker
from pahq.report.tracking.wandb_sink import Wandb

ROWS = 10_000
"""Rows of a table at most: W&B shows no more of one."""


def open_tracker(
    settings: Tracking | None,
    folder: Path | None,
    job: str,
    config: dict[str, Any],
    say: Callable[[str], None],
    *,
    always: bool = True,
    anew: bool = False,
) -> Tracker:
    """The tracker of a run; it writes ``events.jsonl`` where there is a folder, and tells W&B where that is asked for.

    settings: None goes on as the run in ``folder`` was tracked before. job, config, say: see ``Wandb``. always: whether
    there are events for a run that W&B is told nothing about. anew: what lies in ``folder`` is of another run, and
    that run's events go. Raises PahqError where W&B cannot be had, before any work.
    """
    if anew and folder is not None:
        with naming(folder):
            for name in (EVENTS_FILE, TRACKING_FILE):
                (folder / name).unlink(missing_ok=True)
    kept = None if folder is None else read_kept(folder)
    if settings is None and kept is not None:
        settings = Tracking()
    sinks: list[Sink] = []
    number = 0
    asked = settings is not None and settings.wandb
    if folder is not None and (always or asked):
        lines = Jsonl(folder / EVENTS_FILE)
        sinks.append(lines)
        number = lines.number
    if settings is not None and settings.wandb:
        if folder is not None and kept is not None:
            settings = settings.after(kept, folder)
        sink = Wandb(settings, None if kept is None else kept["id"], folder, job, config, say)
        sinks.append(sink)
        news = sink.kept() if kept is None else None
        if folder is not None and news is not None:
            write_kept(folder, news)
    return Tracker(sinks, number, _memory)


def circuit_table(circuit: Circuit) -> Table:
    """The edges that were tested or kept: those of the circuit first, then those of the largest effects."""
    graph, mask, effects, order = circuit.graph, circuit.mask, circuit.effects, circuit.order
    rows, columns = np.nonzero(mask | (order >= 0))
    size = np.nan_to_num(np.abs(effects[rows, columns]), nan=-1.0)
    ranked = np.lexsort((order[rows, columns], -size, ~mask[rows, columns]))
    found = []
    for row, column in zip(rows[ranked[:ROWS]].tolist(), columns[ranked[:ROWS]].tolist(), strict=True):
        effect = float(effects[row, column])
        place = row, column
        names = graph.sender_name(column), graph.receivers[row].name
        found.append([*names, effect if math.isfinite(effect) else None, int(order[place]), bool(mask[place])])
    return Table(("sender", "receiver", "effect", "order", "kept"), found, max(0, len(ranked) - ROWS))


def result_files(folder: Path | None) -> list[Path]:
    """What lies in a run's folder, but for locks and the like, in the order of their names."""
    if folder is None:
        return []
    with naming(folder):
        entries = sorted(folder.iterdir())
    hidden = (TRACKING_FILE,)  # where the run lies in W&B, and of no use there
    return [path for path in entries if path.is_file() and not path.name.startswith(".") and path.name not in hidden]


def _memory() -> dict[str, int]:
    """Largest memory held so far, in bytes."""
    return machine.peak_memory(torch.device("cuda" if torch.cuda.is_initialized() else "cpu"))
