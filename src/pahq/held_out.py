"""The models and examples that finished runs are evaluated on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pahq.errors import PahqError
from pahq.evaluation.examples import Examples
from pahq.inputs import device_of, load, metric_of, task_of, task_options
from pahq.model import Transformer
from pahq.precision.policy import get_policy
from pahq.report import identity, machine
from pahq.report.config import OBJECT
from pahq.report.finished import FinishedRun
from pahq.report.passes import Passes, PassesFile
from pahq.report.progress import Watch
from pahq.report.steps import Steps
from pahq.report.tracking.tracker import Tracker
from pahq.task import Task
from pahq.task.prompts import Prompts


class HeldOut:
    """Models, prompts and evaluated examples, each made once for all runs that share them.

    split, n, metric, device: see ``assessment.EvaluationOptions``. model, task: in place of the runs' own.
    passes: how many passes are expected, for whoever watches. kept: where finished ones go, None for nowhere.
    tracker: takes events.
    """

    def __init__(
        self,
        split: str,
        n: int | None,
        metric: str | None,
        device: str | None,
        model: Any,
        task: str | Task | None,
        watch: Watch,
        passes: int,
        kept: PassesFile | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self.split, self.n, self.metric, self.device = split, n, metric, device
        self.model, self.task, self.watch, self.steps = model, task, watch, Steps(watch)
        self.passes, self.done, self.name, self.kept = passes, 0, "", kept
        self.tracker = Tracker() if tracker is None else tracker
        self.machine: dict[str, Any] = {}
        self._models: dict[str, tuple[Transformer, str]] = {}
        self._examples: dict[str, Examples] = {}

    def begin(self, name: str) -> None:
        """The passes that follow are for the run of this name."""
        self.name = name

    def close(self) -> None:
        """The work is over, for good or ill."""
        self.steps.end()

    def _pass(self) -> None:
        self.done += 1
        of = max(self.done, self.passes)
        self.steps.step(self.name, self.done, of)
        self.tracker.progress("evaluation", {"run": self.name, "done": self.done, "of": of})

    def examples(self, run: FinishedRun) -> Examples:
        """What the run is evaluated on. Raises PahqError where model, weights or prompts cannot be had."""
        config = run.config
        graph, task = run.circuit.graph, self._task(run)
        metric = metric_of(config.metric if self.metric is None else self.metric, task)
        device = config.device if self.device is None else self.device
        about = ("model", "dtype", "fold_ln", "center_writing", "center_unembed", "fold_value_biases")
        of_model = repr([device, *(getattr(config, name) for name in about)])
        of_task = repr([config.task, task_options(config), config.n, config.seed, config.ablation, metric])
        key = f"{of_model} {of_task} {graph.options()}"
        if key not in self._examples:
            if of_model not in self._models:
                self._models[of_model] = self._load(run, device)
            model, weights = self._models[of_model]
            n = config.n if self.n is None else self.n
            prompts = task.prompts(model, n, config.seed, self.split)
            about = {"weights": weights, "metric": metric, "ablation": config.ablation, "graph": graph.options()}
            kept = None if self.kept is None else self._taken_up(self.kept, about, model, task, prompts)
            self._examples[key] = Examples(model, prompts, graph, task, metric, config.ablation, self._pass, kept)
        return self._examples[key]

    def _taken_up(
        self, kept: PassesFile, about: dict[str, Any], model: Transformer, task: Task, prompts: Prompts
    ) -> Passes:
        """The passes that an interrupted evaluation has run on the very same things."""
        about |= {"task": repr(task), "prompts": identity.of_prompts(prompts), "dtype": str(model.dtype)}
        about |= {"device": str(model.device), "threads": torch.get_num_threads()}
        passes = kept.of(about | {"versions": machine.versions(), "commit": machine.commit()}, len(prompts))
        if len(passes):
            self.watch.say(f"taking up {len(passes)} passes of an interrupted evaluation …")
        return passes

    def _task(self, run: FinishedRun) -> Task:
        if isinstance(self.task, Task):
            return self.task
        name = run.config.task if self.task is None else self.task
        if name.startswith(OBJECT):
            raise PahqError(f"{run.path}: its task was a Python object; call pahq.evaluate with that object as task")
        return task_of(name, task_options(run.config))

    def _load(self, run: FinishedRun, device: str) -> tuple[Transformer, str]:
        """The model, and the fingerprint of its weights."""
        if self.model is None and run.config.model.startswith(OBJECT):
            raise PahqError(f"{run.path}: its model was a Python object; call pahq.evaluate with that object as model")
        device_of(device)
        config = replace(run.config, device=device)
        model = load(config.model if self.model is None else self.model, config, self.watch, get_policy("fp32"), None)
        then, now = run.record.get("identity", {}).get("weights"), identity.of_model(model)
        if then is not None and then != now:
            raise PahqError(
                f"{run.path}: the weights of {config.model} are no longer those of the run; bring the old ones back"
            )
        self.machine = machine.describe(model.device)
        return model, now
