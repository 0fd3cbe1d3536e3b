"""What each of the three streams gains, beside the paper's minutes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pahq.report.finished import FinishedRun
from pahq.report.progress import Watch
from pahq.report.tables import Row
from pahq.reproduction import paper
from pahq.reproduction.cells import Cell, Grid
from pahq.reproduction.modelled import SIZES, Rates
from pahq.reproduction.output import Reproduction
from pahq.reproduction.settings import GridOptions
from pahq.reproduction.streams import VARIANTS, measured_ms, modelled_ms

ABOUT_AN_H100 = Rates(50e9, 3000e9, {"e4m3": 1000e12, "bf16": 600e12, "fp32": 50e12}, 2e-6, 4e-6)
"""Rates of the modelled device: stated, not measured."""
BATCH, TOKENS, REPEATS = 50, 15, 3
"""The paper's prompts on ioi, and rounds on a GPU."""


def table_ablation(out: str | Path, how: GridOptions, watch: Watch, command: str | None = None) -> dict[str, Any]:
    """An edge's time by streams in use: the record, as in ``table-ablation.json``. Raises PahqError.

    Two ways on a GPU: the paper's schedule, one whole pass for each edge at the geometry of GPT-2 small; and our own
    engine's runs under policy ``pahq``. Elsewhere the paper's schedule on a clock, from stated rates (modelled).
    """
    folder = Reproduction(out, "table-ablation")
    device = torch.device(how.device)
    count = 10 if how.quick else 50
    if device.type == "cuda":
        grid = Grid(folder.path, watch)
        watch.say("timing the paper's schedule …")
        ms, _, _ = measured_ms(SIZES["gpt2"], device, BATCH, TOKENS, count, REPEATS)
        runs = _engine(grid, how)
    else:
        grid, runs = None, {}
        ms, _ = modelled_ms(SIZES["gpt2"], ABOUT_AN_H100, BATCH, TOKENS, count)
    rows = [_row(name, ms, runs) for name in (*VARIANTS, "fp32")]
    about = {
        "how": "measured" if device.type == "cuda" else "modelled",
        "rates": None if device.type == "cuda" else asdict(ABOUT_AN_H100),
        "geometry": asdict(SIZES["gpt2"]),
        "batch": BATCH,
        "tokens": TOKENS,
        "edges": count,
    }
    record = {"command": command, "options": asdict(how), "about": about, "paper": paper.SOURCES}
    return folder.write(record, grid, {"": rows})


def _engine(grid: Grid, how: GridOptions) -> dict[str, FinishedRun]:
    """Runs of our engine by variant."""
    setting = how.single()
    threshold = how.sweep("ioi", "kl", (0.05 if how.offline else 0.01,))[0]
    found = dict[str, FinishedRun]()
    for name, streams in {**VARIANTS, "fp32": None}.items():
        policy = "fp32" if streams is None else "pahq"
        given = None if streams is None else ",".join(streams) or "none"
        options = {"policy": policy, "threshold": threshold}
        cell = Cell(setting, f"streams-{name}", setting.metrics["kl"], options, given)
        for run in grid.run([cell]).values():
            found[name] = run
    return found


def _row(name: str, ms: dict[str, float], runs: dict[str, FinishedRun]) -> Row:
    published = paper.STREAMS.get(name)
    run = runs.get(name)
    return {
        "streams": name,
        "ms_per_edge": ms[name],
        "times_all": ms[name] / ms["all"],
        "paper_minutes": published,
        "paper_times_all": None if published is None else published / paper.STREAMS["all"],
        "engine_minutes": None if run is None else run.cost["seconds"] / 60,
    }
