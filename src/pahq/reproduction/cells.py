"""The cells of a grid: each one an ordinary run in a folder of its own, so that a killed grid goes on where it was.

A cell that fails is told and left out; the others go on.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pahq.api import execute
from pahq.errors import PahqError
from pahq.evaluation.truth.base import Truth, load_truth
from pahq.inputs import absolute
from pahq.model import load_model
from pahq.report.config import OBJECT, RunConfig
from pahq.report.finished import FinishedRun, finished_run
from pahq.report.folder import RUN_FILE, RunFolder
from pahq.report.progress import Watch

RUNS = "runs"
"""Folder of the cells' runs within that of a grid."""


@dataclass(frozen=True)
class Setting:
    """A model with prompts, and what is known about its circuit.

    model, task: as ``RunConfig`` has them. get_model, get_task: give objects in their place; without get_model the
    name is loaded. truth: name of a known circuit. metrics: kind of metric (``kl``, ``task``) -> its name.
    common: options of ``RunConfig`` that all cells share.
    """

    name: str
    model: str
    task: str
    truth: str | None = None
    metrics: Mapping[str, str] = field(default_factory=lambda: {"kl": "kl_div"})
    common: Mapping[str, Any] = field(default_factory=dict)
    get_model: Callable[[], Any] | None = None
    get_task: Callable[[], Any] | None = None

    @cached_property
    def known(self) -> Truth | None:
        """The known circuit; raises PahqError where it cannot be had."""
        return None if self.truth is None else load_truth(self.truth)


def on_truth(name: str, metrics: Mapping[str, str] | None = None, most: int | None = None, **common: Any) -> Setting:
    """A known circuit's own model and prompts, in the setting in which the model has it.

    metrics: kind -> name, None: its own. most: prompts at most. common: options to replace.
    Raises PahqError where the circuit cannot be had, or has no model.
    """
    truth = load_truth(name)
    if truth.get_model is None or truth.get_task is None:
        raise PahqError(f"truth '{name}': no model and prompts belong to it; choose one that has them (pahq truth)")
    options = truth.options()
    metric = options.pop("metric")
    options["n"] = truth.n if most is None else min(truth.n, most)
    chosen = {"kl": metric} if metrics is None else metrics
    return Setting(
        name, f"{OBJECT}Transformer", f"{OBJECT}{name}", name, chosen, options | common, truth.model, truth.task
    )


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    row: the method as tables name it; metric: its name; options: others of ``RunConfig``. streams: as ``discover``'s.
    """

    setting: Setting
    row: str
    metric: str
    options: Mapping[str, Any]
    streams: str | None = None

    @property
    def config(self) -> RunConfig:
        """Raises PahqError for options that no run can have."""
        s = self.setting
        return absolute(
            RunConfig(**{"model": s.model, "task": s.task, "metric": self.metric, **s.common, **self.options})
        )

    @property
    def name(self) -> str:
        """Its folder's name."""
        size = [f"{self.options[key]:g}" for key in ("threshold",) if key in self.options]
        return re.sub(r"[^\w.-]+", "_", "-".join([self.setting.name, self.metric, self.row, *size]))


class Grid:
    """Runs cells, each in ``out/runs/NAME``.

    separate: every cell in a process of its own, so that its peak memory is its own; for models and tasks by name.
    failures: cell -> why it has no run.
    """

    def __init__(self, out: Path, watch: Watch, separate: bool = False) -> None:
        self.out, self.watch, self.separate = out, watch, separate
        self.failures: dict[str, str] = {}
        self._objects: tuple[str, Any, Any] | None = None
        self._missing: dict[str, str] = {}

    def run(self, cells: Sequence[Cell]) -> dict[str, FinishedRun]:
        """cell's name -> its run, in the order of the cells; those that failed are in ``failures``."""
        found = {}
        for place, cell in enumerate(cells, 1):
            run = self._one(cell, f"[{place}/{len(cells)}] {cell.name}")
            if run is not None:
                found[cell.name] = run
        return found

    def _one(self, cell: Cell, title: str) -> FinishedRun | None:
        folder = self.out / RUNS / cell.name
        try:
            config = cell.config
            if (folder / RUN_FILE).exists():
                with RunFolder(folder) as there:
                    there.check(config)
                return finished_run(folder)
            self.watch.say(title)
            if self.separate and not config.model.startswith(OBJECT) and not config.task.startswith(OBJECT):
                _in_process_of_its_own(config, folder)
            else:
                model, task = self._loaded(cell.setting, config)
                execute(config, folder, model=model, task=task, watch=self.watch, streams=cell.streams)
            return finished_run(folder)
        except (PahqError, OSError, RuntimeError, MemoryError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self.failures[cell.name] = reason
            self.watch.say(f"{title} failed: {reason}")
            return None

    def _loaded(self, setting: Setting, config: RunConfig) -> tuple[Any, Any]:
        """Model and task of a setting, loaded once as long as the cells in a row are about it."""
        if setting.name in self._missing:
            raise PahqError(self._missing[setting.name])
        if self._objects is None or self._objects[0] != setting.name:
            try:
                model = load_model(config.model) if setting.get_model is None else setting.get_model()
                task = None if setting.get_task is None else setting.get_task()
            except PahqError as error:
                self._missing[setting.name] = str(error)
                raise
            self._objects = (setting.name, model, task)
        return self._objects[1:]


def _in_process_of_its_own(config: RunConfig, folder: Path) -> None:
    """Raises PahqError with the last line of what the process said if it failed."""
    command = [sys.executable, "-m", "pahq.reproduction.cells", json.dumps(config.to_dict()), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        raise PahqError(said[-1].removeprefix("error: "))


def main() -> None:
    """One cell: its configuration as JSON, and its folder."""
    config, folder = sys.argv[1:]
    try:
        execute(RunConfig.from_dict(json.loads(config), "configuration"), folder)
    except PahqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
