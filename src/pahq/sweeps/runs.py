"""The runs of a grid: each the options of one ``pahq discover``, a name, and the words of its command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.inputs import absolute, device_of, metric_of, task_of, task_options
from pahq.method.registry import get_method
from pahq.precision.policy import get_policy
from pahq.report.config import RunConfig
from pahq.sweeps.command import AXES, judged, words
from pahq.sweeps.grid import parts, points

LONGEST = 200
"""Bytes of a name: files are called so, with an ending."""


@dataclass(frozen=True)
class Run:
    """task, model, policy: what they are called in names. config: complete, with whole paths and the metric's name.

    extras: further options of the command. The run's folder and log are called by its name.
    """

    name: str
    task: str
    model: str
    policy: str
    config: RunConfig
    extras: Mapping[str, Any]

    def words(self, out: Path) -> list[str]:
        """What follows ``pahq`` to make this run in the sweep's folder ``out``."""
        return words(self.config, self.extras, str(out / self.name))

    def command(self, out: Path) -> str:
        return shlex.join(["pahq", *self.words(out)])


def expand(grid: Mapping[str, Any], where: str, only: str | None = None) -> list[Run]:
    """The grid's runs, in its own order; one that several parts ask for is there once.

    where: names the grid in errors. only: a pattern such as ``ioi_*`` that names must match.
    Raises PahqError that names the key for whatever no run can have, before anything is run.
    """
    found: dict[str, Run] = {}
    for part in parts(grid, where):
        options, extras = judged(part["options"], f"{part['where']}: options")
        judge = _Judge(part["where"], options)
        for point in points(part | {"options": options}):
            run = judge.run(point, part["name"], extras)
            other = found.setdefault(run.name.lower(), run)  # some file systems do not tell case apart
            if other.config != run.config:
                raise PahqError(
                    f"{part['where']}: run {run.name} is there already ({run.config.difference(other.config)}); "
                    "give this part a 'name', in which its runs' names end, or name its models or tasks"
                )
    runs = list(found.values())
    chosen = [run for run in runs if only is None or fnmatchcase(run.name, only)]
    if not chosen:
        raise PahqError(f"only: '{only}' matches none of the {len(runs)} runs; they are called such as {runs[0].name}")
    return chosen


def run_name(parts: Sequence[str]) -> str:
    """Parts of a name as one that every file system takes."""
    name = "_".join(re.sub(r"[^\w.+-]+", "_", part).strip("_") for part in parts if part)
    return name.lstrip(".-").encode()[:LONGEST].decode(errors="ignore") or "run"


class _Judge:
    """Makes the runs of one part; what depends on one value alone is judged once."""

    def __init__(self, where: str, options: Mapping[str, Any]) -> None:
        self.where, self.options = where, options
        self._tasks: dict[str, Any] = {}
        self._policies: set[str] = set()
        if "device" in options:
            self._naming("options", lambda: device_of(options["device"]))

    def run(self, point: Mapping[str, tuple[str, Any]], suffix: str, extras: Mapping[str, Any]) -> Run:
        values = {option: point[key][1] for option, key in AXES.items() if key in point}
        config = self._naming("options", lambda: absolute(RunConfig(**values, **self.options)))
        task = self._task(config)
        config = replace(config, metric=self._naming("metrics", lambda: metric_of(config.metric, task)))
        self._policy(config)
        self._naming("options", lambda: _check_method(config))
        shown = {key: name for key, (name, _) in point.items()}
        name = run_name(
            [
                shown["tasks"],
                shown["models"],
                shown.get("thresholds") or (f"{shown['edges']}edges" if "edges" in shown else "own"),
                str(config.metric),
                "" if config.method == "acdc" else config.method,
                "" if shown["policies"] == "fp32" else shown["policies"],
                suffix,
            ]
        )
        return Run(name, shown["tasks"], shown["models"], shown["policies"], config, extras)

    def _task(self, config: RunConfig) -> Any:
        if config.task not in self._tasks:
            self._tasks[config.task] = self._naming("tasks", lambda: task_of(config.task, task_options(config)))
        return self._tasks[config.task]

    def _policy(self, config: RunConfig) -> None:
        if config.policy not in self._policies:
            self._naming("policies", lambda: get_policy(config.policy, config.under_test))
            self._policies.add(config.policy)

    def _naming(self, key: str, make: Any) -> Any:
        try:
            return make()
        except PahqError as error:
            raise PahqError(f"{self.where}: {key}: {error}") from None


def _check_method(config: RunConfig) -> None:
    """Raises PahqError for options that the method, or the prefilter, does not know."""
    name = config.prefilter or config.method
    if get_method(name).scores_edges:
        get_method(name).options(config.method_options)
