"""The studies behind ``pahq precision``: from options to a folder of figures. ``api`` does the same for circuits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.evaluation.precision.groups import check_sizes, measure_groups
from pahq.evaluation.precision.replay import Tested, sweep_of
from pahq.evaluation.precision.sensitivity import FORMATS, Watcher, budget_bytes, measure_sensitivity, single_policies
from pahq.evaluation.precision.snr import measure_snr
from pahq.files import read_json
from pahq.inputs import DTYPES, absolute, acdc_options, device_of, load, metric_of, task_of, task_options, timestamp
from pahq.method.acdc import Progress
from pahq.model import Transformer
from pahq.precision.policy import get_policy
from pahq.report import identity, machine
from pahq.report.config import RunConfig
from pahq.report.figures.chart import MISSING
from pahq.report.figures.precision import draw_groups, draw_sensitivity, draw_snr
from pahq.report.folder import RUN_FILE
from pahq.report.progress import Watch
from pahq.report.steps import Steps
from pahq.report.study import StudyFolder
from pahq.task.prompts import Prompts

Folder = str | PathLike[str]


def snr(config: RunConfig, out: Folder, edge: str | None = None, **how: Any) -> dict[str, Any]:
    """``pahq precision snr``: the record, as in ``run.json``; see ``evaluation.precision.snr``.

    config: model, task, metric, n, seed, ablation, device, policy, under_test. how: watch and command, see ``_study``.
    Raises PahqError for bad input.
    """
    policy = get_policy(config.policy, config.under_test)

    def measure(model: Transformer, prompts: Prompts, metric: str, steps: Steps) -> dict[str, Any]:
        found = measure_snr(model, prompts, metric, config.ablation, policy, edge, lambda what: steps.step(f"{what} …"))
        return asdict(found)

    facts = {"policy": policy.to_dict(), "options": {"edge": edge}}
    return _study("snr", config, out, measure, draw_snr, facts, **how)


def sensitivity(
    config: RunConfig,
    out: Folder,
    kinds: Sequence[str] | None = None,
    formats: Sequence[str] = FORMATS,
    quantised: str = "differences",
    tests: int = 400,
    budget: str | None = None,
    run: Folder | None = None,
    **how: Any,
) -> dict[str, Any]:
    """``pahq precision sensitivity``: the record; see ``evaluation.precision.sensitivity`` for the options.

    config: also threshold and absolute, of the FP32 sweep. run: folder of a finished run whose sweep is sampled
    instead; its options count then, and model and prompts must be the same. Raises PahqError for bad input.
    """
    for policy in single_policies(kinds, formats, quantised):  # before the model is loaded, which takes a while
        policy.require(device_of(config.device), DTYPES[config.dtype])
    if budget is not None:
        budget_bytes(budget, 1)
    if run is not None:
        config = _options_of(run, config)

    def measure(model: Transformer, prompts: Prompts, metric: str, steps: Steps) -> dict[str, Any]:
        options = acdc_options(replace(config, metric=metric))
        swept = None if run is None else _sweep_of(run, model, prompts)
        watcher = _SweepWatcher(steps, metric) if swept is None else _StepWatcher(steps)
        found = measure_sensitivity(model, prompts, options, kinds, formats, quantised, tests, budget, watcher, swept)
        return asdict(found)

    asked = {
        "run": None if run is None else str(run),
        "kinds": kinds,
        "formats": list(formats),
        "quantised": quantised,
        "tests": tests,
        "budget": budget,
    }
    return _study("sensitivity", config, out, measure, draw_sensitivity, {"options": asked}, **how)


def groups(
    config: RunConfig,
    out: Folder,
    heads: int | None = None,
    tests: int = 64,
    sizes: Sequence[int] | None = None,
    **how: Any,
) -> dict[str, Any]:
    """``pahq precision groups``: the record; see ``evaluation.precision.groups`` for the options.

    config: also threshold, of the decisions that are compared. Raises PahqError for bad input.
    """
    policy = get_policy(config.policy, config.under_test)
    if sizes is not None:
        check_sizes(sizes)

    def measure(model: Transformer, prompts: Prompts, metric: str, steps: Steps) -> dict[str, Any]:
        threshold, seed = config.threshold, config.seed
        assert threshold is not None
        found = measure_groups(
            model, prompts, metric, config.ablation, policy, threshold, heads, tests, seed, sizes, steps.step
        )
        return asdict(found)

    facts = {"policy": policy.to_dict(), "options": {"heads": heads, "tests": tests, "sizes": sizes}}
    return _study("groups", config, out, measure, draw_groups, facts, **how)


def _options_of(run: Folder, config: RunConfig) -> RunConfig:
    """The configuration of a finished run, in FP32, on the device asked for; raises PahqError if there is none."""
    folder = Path(run)
    if not (folder / RUN_FILE).exists():
        raise PahqError(f"{run}: there is no finished run ({RUN_FILE} is missing); check the path")
    record = read_json(folder / RUN_FILE)
    if not isinstance(record.get("config"), dict) or "study" in record:
        raise PahqError(f"{run}: not the folder of a run of pahq discover; check the path")
    then = RunConfig.from_dict(record["config"], str(folder / RUN_FILE))
    if then.method != "acdc" or then.prefilter is not None:
        raise PahqError(f"{run}: the run is no sweep of all edges; give one of method acdc without a prefilter")
    if then.dtype != "float32":
        raise PahqError(f"{run}: the run is in {then.dtype}, with which low precision does not go; take one in float32")
    names = ("model", "task", "n", "seed", "device", "pad", "task_options")
    return replace(then, policy="fp32", under_test=None, exact=None, **{name: getattr(config, name) for name in names})


def _sweep_of(run: Folder, model: Transformer, prompts: Prompts) -> list[Tested]:
    """The tests of a run on this model and these prompts; raises PahqError if it was on others."""
    folder = Path(run)
    then = read_json(folder / RUN_FILE).get("identity", {})
    for what, now in (("weights", identity.of_model(model)), ("prompts", identity.of_prompts(prompts))):
        if then.get(what) != now:
            raise PahqError(
                f"{run}: its {what} are others; repeat the run's --model, --task, --n, --seed and task options"
            )
    return sweep_of(Circuit.load(folder))


class _StepWatcher(Watcher):
    """Shows the policies one by one."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def step(self, what: str, done: int, of: int) -> None:
        self.steps.step(what, done, of)


class _SweepWatcher(_StepWatcher):
    """Shows the sweep as ``pahq discover`` does, and then the policies one by one."""

    def __init__(self, steps: Steps, metric: str) -> None:
        super().__init__(steps)
        steps.watch.begin(metric)
        self._swept = False

    def sweep(self, progress: Progress) -> None:
        self.steps.watch.update(progress)

    def step(self, what: str, done: int, of: int) -> None:
        if not self._swept:
            self.steps.watch.end()
            self._swept = True
        super().step(what, done, of)


def _study(
    name: str,
    config: RunConfig,
    out: Folder,
    measure: Callable[[Transformer, Prompts, str, Steps], dict[str, Any]],
    plot: Callable[[Any, Any], None],
    facts: dict[str, Any],
    *,
    watch: Watch | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Loads, measures and writes. watch: told about the course. command: what was typed, for the record."""
    watch = Watch() if watch is None else watch
    began, started = time.perf_counter(), timestamp()
    task = task_of(config.task, task_options(config))
    config = replace(absolute(config), metric=metric_of(config.metric, task))
    assert config.metric is not None
    get_policy(config.policy, config.under_test).require(device_of(config.device), DTYPES[config.dtype])
    folder = StudyFolder(out, name)
    try:
        model = load(config.model, config, watch, get_policy("fp32"), None)
        prompts = task.prompts(model, config.n, config.seed, "validation")
        steps = Steps(watch)
        try:
            figures = measure(model, prompts, config.metric, steps)
        finally:
            watch.end()
            steps.end()
        used = ("model", "task", "metric", "n", "seed", "ablation", "device", "dtype", "policy", "under_test")
        used += ("threshold", "absolute", "task_options", "pad")
        record = {
            "command": command,
            "config": {option: getattr(config, option) for option in used},
            **facts,
            "identity": {"weights": identity.of_model(model), "prompts": identity.of_prompts(prompts)},
            "versions": machine.versions(),
            "commit": machine.commit(),
            "machine": machine.describe(model.device),
            "source": dict(model.source),
            "started": started,
            "finished": timestamp(),
            "peak_memory": machine.peak_memory(model.device),
            "total_seconds": time.perf_counter() - began,
            "figures": figures,
        }
        files = folder.write(figures["rows"], plot, record)
    except BaseException:  # Ctrl-C, too: leaves things as they were
        folder.discard()
        raise
    if len(files) == 2:
        watch.say(MISSING)
    return record
