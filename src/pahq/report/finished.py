"""Finished runs as they lie in their folders, circuits without one, and short names that tell runs apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.evaluation.circuit import JSON_FILE, Circuit
from pahq.files import read_json
from pahq.method.registry import get_method
from pahq.report.config import OBJECT, RunConfig
from pahq.report.folder import RUN_FILE, START_FILE

SIZES = ("threshold", "edges")
"""Options that set how large a circuit gets: runs that differ in nothing else are one method's, and share a curve."""


@dataclass(frozen=True)
class CircuitFolder:
    """A folder with a circuit: of a finished run, or what ``Circuit.save`` and ``pahq convert`` write."""

    path: Path
    circuit: Circuit


@dataclass(frozen=True)
class FinishedRun(CircuitFolder):
    """circuit, record: what ``circuit.*`` and ``run.json`` hold; config: the run's options."""

    record: dict[str, Any]
    config: RunConfig

    @property
    def group(self) -> str:
        """Equal for runs that differ in nothing but ``SIZES`` and how scores are cut off there."""
        kept = {name: value for name, value in self.config.to_dict().items() if name not in (*SIZES, "select")}
        return json.dumps(kept, sort_keys=True)

    @property
    def on_objects(self) -> bool:
        """Whether model or task were given as Python objects, and so cannot be had by name."""
        return any(name.startswith(OBJECT) for name in (self.config.model, self.config.task))

    @property
    def cost(self) -> dict[str, Any]:
        """What the search took, None where unknown or not the method's way.

        seconds of the search, total_seconds of the run; states evaluated, whole passes, gradients taken or steps of
        training; peak memory in bytes on the host and on the device.
        """
        search, peak = self.record.get("search", {}), self.record.get("peak_memory", {})
        stats = search.get("stats", {})
        return {
            "seconds": search.get("seconds"),
            "total_seconds": self.record.get("total_seconds"),
            "states": search.get("states"),
            "passes": search.get("passes"),
            "gradients": stats.get("gradients"),
            "steps": stats.get("steps"),
            "host_bytes": peak.get("host_bytes"),
            "device_bytes": peak.get("device_bytes"),
        }


def finished_run(path: str | PathLike[str]) -> FinishedRun:
    """The run in a folder; raises PahqError where there is none, or none that is finished."""
    folder = Path(path)
    if not folder.is_dir():
        raise PahqError(f"{path}: there is no such folder; give the folder of a finished run")
    if not (folder / RUN_FILE).exists():
        if (folder / START_FILE).exists():
            raise PahqError(f"{path}: this run is not finished; go on with it: pahq resume {path}")
        if (folder / JSON_FILE).exists():
            raise PahqError(
                f"{path}: it holds a circuit but no run ({RUN_FILE} is missing); give it as --against, or open it with "
                "Circuit.load"
            )
        raise PahqError(f"{path}: there is no finished run ({RUN_FILE} is missing); check the path")
    record = read_json(folder / RUN_FILE)
    if not isinstance(record.get("config"), dict) or "study" in record:
        raise PahqError(f"{path}: not the folder of a run of pahq discover; check the path")
    return FinishedRun(folder, Circuit.load(folder), record, RunConfig.from_dict(record["config"], str(path)))


def circuit_in(path: str | PathLike[str]) -> CircuitFolder:
    """The finished run in a folder, or the circuit that lies there without one; raises PahqError as finished_run."""
    folder = Path(path)
    alone = not any((folder / name).exists() for name in (RUN_FILE, START_FILE))
    if alone and (folder / JSON_FILE).exists():
        return CircuitFolder(folder, Circuit.load(folder))
    return finished_run(path)


def group_names(runs: Sequence[FinishedRun]) -> dict[str, str]:
    """group -> its name: the method, the policy if it is of low precision, and every option in which groups differ."""
    configs = {run.group: run.config.to_dict() for run in runs}
    for config in configs.values():  # said where it is not what the method does by itself
        by_size = get_method(config["method"]).by_size
        config["absolute"] = None if config["absolute"] == by_size else "signed" if by_size else "absolute"
    options = [name for name in next(iter(configs.values()), {}) if name not in (*SIZES, "select", "method", "policy")]
    odd = [name for name in options if len({tuple(_words(name, c[name])) for c in configs.values()}) > 1]
    names = {}
    for group, config in configs.items():
        words = [config["method"]] + ([config["policy"]] if config["policy"] != "fp32" else [])
        for name in odd:
            words += _words(name, config[name])
        name = " ".join(words)
        same = sum(other.partition(" (")[0] == name for other in names.values())
        names[group] = f"{name} ({same + 1})" if same else name  # models of one name in two folders, say
    return names


def run_names(runs: Sequence[FinishedRun]) -> list[str]:
    """A name for each run: its group's and its size option; the same run given twice is told by its folder."""
    groups = group_names(runs)
    names = []
    for run in runs:
        config = run.config.to_dict()
        size = [] if config.get("threshold") is None else [f"{config['threshold']:g}"]
        size += [] if config.get("edges") is None else [f"{config['edges']} edges"]
        names.append(" ".join([groups[run.group], *size]))
    return [f"{name} ({run.path})" if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]


def _words(name: str, value: Any) -> list[str]:
    """A value as part of a name."""
    if isinstance(value, dict):
        return [f"{key}={item}" for key, item in value.items()]
    if isinstance(value, bool):
        return [name.replace("_", "-")] if value else []
    if value is None:
        return []
    if isinstance(value, str):
        return [Path(value).stem if name in ("model", "task") else value]
    return [f"{name}={value}"]
