"""Folders that figures are drawn from, made in a few seconds: runs on a tiny model, a comparison, precision studies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import pahq
from pahq.api import execute
from pahq.evaluation.circuit import Circuit
from pahq.report.config import RunConfig
from pahq.report.figures.precision import draw_groups, draw_sensitivity, draw_snr
from pahq.report.study import StudyFolder
from tiny import RandomTask, transformer

LAYERS, HEADS = 3, 4


def make(folder: Path) -> Path:
    """Runs ``loose``, ``tight`` (ACDC) and ``scored`` (EAP); ``compared``, ``evaluated``; a folder for each study."""
    model, task = transformer(LAYERS, HEADS), RandomTask(default_metric="logit_diff")
    runs: dict[str, dict[str, Any]] = {
        "loose": {"threshold": 0.05},
        "tight": {"threshold": 0.02},
        "scored": {"method": "eap", "edges": 40},
    }
    for name, options in runs.items():
        config = RunConfig("object:tiny", "object:random", metric="logit_diff", n=3, **options)
        execute(config, folder / name, model=model, task=task, view=False)
    how: dict[str, Any] = {
        "model": model,
        "task": task,
        "bootstrap": 20,
        "truth": str(folder / "tight" / "circuit.json"),
    }
    pahq.compare([folder / "loose", folder / "scored"], folder / "compared", **how)
    more: dict[str, Any] = {"knockouts": 0, "removals": 0, "random_circuits": 0}
    pahq.evaluate([folder / "loose"], folder / "evaluated", **how, **more)
    save_study(folder / "snr", snr_rows())
    save_study(folder / "sensitivity", sensitivity_rows())
    save_study(folder / "groups", groups_rows())
    return folder


def save_study(folder: Path, rows: list[dict[str, Any]]) -> None:
    draw = {"snr": draw_snr, "sensitivity": draw_sensitivity, "groups": draw_groups}[folder.name]
    StudyFolder(folder, folder.name).write(rows, draw, {"figures": {"rows": rows}})


def snr_rows() -> list[dict[str, Any]]:
    """Two variants over four layers; the first has no noise at the first point, ``exact`` none at all."""
    rows = []
    for variant, noise in (("differences, both in FP32", 0.1), ("values, no head in FP32", 2.0), ("exact", 0.0)):
        for layer in range(4):
            for point in (f"a{layer}", f"m{layer}"):
                this = 0.0 if (layer, point) == (0, "a0") and noise < 1 else noise * (layer + 1)
                db = 20 * np.log10(1 / this) if this else np.inf
                row: dict[str, Any] = {"variant": variant, "point": point, "layer": layer}
                rows.append(row | {f"{k}{s}": v for s in ("", "_read") for k, v in
                                   (("signal", 1.0), ("noise", this), ("snr_db", float(db)))})  # fmt: skip
    return rows


def sensitivity_rows() -> list[dict[str, Any]]:
    """Two ways, some kinds, three formats; an error of zero here and there."""
    kinds = {"differences": ("q", "mlp", "unembed"), "values": ("q", "mlp", "unembed", "softmax", "residual")}
    return [
        {
            "kind": kind,
            "format": name,
            "quantised": mode,
            "error_rms": 0.0 if kind == "q" else 10.0 ** -(3 + at + place),
        }
        for mode, some in kinds.items()
        for at, kind in enumerate(some)
        for place, name in enumerate(("bf16", "int8", "e4m3"))
    ]


def groups_rows() -> list[dict[str, Any]]:
    return [
        {
            "quantised": mode,
            "group": size,
            "bytes_high": 2**20 * (size + 1),
            "seconds": 9 / (size + 1),
            "spearman": near,
        }
        for mode, near in (("differences", 0.99), ("values", None))
        for size in (0, 1, 4)
    ]


def circuit_of(folder: Path) -> Circuit:
    return Circuit.load(folder)


def spoil(folder: Path, file: str, *path: str | int) -> None:
    """Takes an entry of a JSON file away."""
    record = json.loads((folder / file).read_text())
    at = record
    for step in path[:-1]:
        at = at[step]
    del at[path[-1]]
    (folder / file).write_text(json.dumps(record))
