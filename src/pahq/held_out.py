"""The models and examples that finished runs are evaluated on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pahq.errors import PahqError
from pahq.evaluation.examples import Examples
from pahq.inputs import device_of, load, metric_of, task_options
from pahq.model import Transformer
from pahq.precision.policy import get_policy
from pahq.report import identity, machine
from pahq.report.config import OBJECT
from pahq.report.finished import FinishedRun
from pahq.report.progress import Watch
from pahq.report.steps import Steps
from pahq.task import Task, get_task


class HeldOut:
    """Models, prompts and evaluated examples, each made once for all runs that share them.

    split, n, metric, device: see ``assessment.EvaluationOptions``. model, task: in place of the runs' own.
    passes: how many passes are expected, for whoever watches.
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
    ) -> None:
        self.split, self.n, self.metric, self.device = split, n, metric, device
        self.model, self.task, self.watch, self.steps = model, task, watch, Steps(watch)
        self.passes, self.done, self.name = passes, 0, ""
        self.machine: dict[str, Any] = {}
        self._models: dict[str, Transformer] = {}
        self._examples: dict[str, Examples] = {}

    def begin(self, name: str) -> None:
        """The passes that follow are for the run of this name."""
        self.name = name

    def end(self) -> None:
        """The work is over, for good or ill."""
        self.steps.end()

    def _pass(self) -> None:
        self.done += 1
        self.steps.step(self.name, self.done, max(self.done, self.passes))

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
            model = self._models[of_model]
            n = config.n if self.n is None else self.n
            prompts = task.prompts(model, n, config.seed, self.split)
            self._examples[key] = Examples(model, prompts, graph, task, metric, config.ablation, self._pass)
        return self._examples[key]

    def _task(self, run: FinishedRun) -> Task:
        if isinstance(self.task, Task):
            return self.task
        name = run.config.task if self.task is None else self.task
        if name.startswith(OBJECT):
            raise PahqError(f"{run.path}: its task was a Python object; call pahq.evaluate with that object as task")
        return get_task(name, **task_options(run.config))

    def _load(self, run: FinishedRun, device: str) -> Transformer:
        if self.model is None and run.config.model.startswith(OBJECT):
            raise PahqError(f"{run.path}: its model was a Python object; call pahq.evaluate with that object as model")
        device_of(device)
        config = replace(run.config, device=device)
        model = load(config.model if self.model is None else self.model, config, self.watch, get_policy("fp32"), None)
        then = run.record.get("identity", {}).get("weights")
        if then is not None and then != identity.of_model(model):
            raise PahqError(
                f"{run.path}: the weights of {config.model} are no longer those of the run; bring the old ones back"
            )
        self.machine = machine.describe(model.device)
        return model
