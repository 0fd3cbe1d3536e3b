"""Finding a circuit from start to finish: what ``pahq discover`` and ``pahq.discover`` both call."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import fields, replace
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from pahq.course import Course, Found
from pahq.errors import PahqError, choices
from pahq.evaluation.behaviour import behaviour
from pahq.evaluation.circuit import Circuit
from pahq.files import read_json, write_json
from pahq.inputs import (
    DTYPES,
    absolute,
    acdc_options,
    device_of,
    held_out_prompts,
    load,
    metric_of,
    task_of,
    task_options,
    timestamp,
)
from pahq.method.registry import get_method
from pahq.model import Transformer
from pahq.precision.policy import Policy, get_policy
from pahq.precision.streamed import StreamedBlocks
from pahq.report import identity, machine, summary
from pahq.report.config import OBJECT, RunConfig
from pahq.report.folder import RUN_FILE, RunFolder
from pahq.report.progress import Watch, watch_for
from pahq.report.tracing import open_scheduler, trace_path, traced
from pahq.report.tracking.opening import circuit_table, open_tracker, result_files
from pahq.report.tracking.settings import Tracking
from pahq.scoring import prefilter, score
from pahq.sweeping import sweep
from pahq.task import Task
from pahq.task.prompts import Prompts
from pahq.viewing import write_viewer


class Outcome(NamedTuple):
    """A circuit, the record of its run (as in ``run.json``), and whether it was finished before."""

    circuit: Circuit
    record: dict[str, Any]
    was_finished: bool


def discover(
    model: Any,
    task: str | Task,
    threshold: float | None = None,
    *,
    out: str | PathLike[str] | None = None,
    progress: bool = False,
    streams: str | None = None,
    trace: str | PathLike[str] | None = None,
    view: bool = True,
    tracking: Tracking | None = None,
    **options: Any,
) -> Circuit:
    """Finds a circuit and returns it.

    model: whatever ``load_model`` takes: a name, folder or file, a ``transformers`` or TransformerLens
        model, or a ``Transformer``. task: a name, a prompt file, or a ``Task``. Known circuits that bring a model
        (``trained-sum``, see ``pahq truth``) are names of models and of tasks, too.
    threshold: an edge goes if cutting it raises the metric by less than this (in the metric's units). Methods that
        score edges keep those with at least this score, or take ``edges``, how many to keep.
    out: folder for the run's files; a run that was cut short there goes on, a finished one is loaded.
    progress: show a bar (or a line now and then) on standard error.
    streams: those of ``load,low,high`` to use, or ``none``; trace: a file for what was done on them, in Chrome's
        format. view: whether ``viewer.html`` is left in the run's folder. tracking: Weights & Biases, see ``Tracking``;
        None: as the run in ``out`` was tracked before, if it was. The circuit is the same whatever these are.
    options: the other fields of ``RunConfig``: method, edges, select, method_options, prefilter, keep,
        order_by_score, metric, n, seed, ablation, absolute, head_order, sender_order, split_qkv, direct_edges,
        split_pos, fold_ln, center_writing, center_unembed, fold_value_biases, pad, task_options, full_vocabulary,
        device, dtype, policy, under_test, exact, check.
    Raises PahqError for bad input. Source: Conmy et al. 2023, section 3; policies: Wang et al. 2025.
    """
    model_name = model if isinstance(model, str) else f"{OBJECT}{type(model).__name__}"
    if isinstance(model, PathLike):
        model = model_name = str(model)
    task_name = task if isinstance(task, str) else f"{OBJECT}{task.name}"
    known = [*signature(discover).parameters, *(field.name for field in fields(RunConfig))]
    known.remove("options")
    for name in (name for name in options if name not in known):
        hint = choices(name, known, otherwise="see help(pahq.discover)")
        raise PahqError(f"discover: '{name}' is unknown; {hint}")
    try:
        config = RunConfig(model=model_name, task=task_name, threshold=threshold, **options)
    except TypeError as error:
        raise PahqError(f"discover: {error}; see the options of RunConfig") from None
    watch = watch_for(quiet=not progress)
    how: dict[str, Any] = {"watch": watch, "streams": streams, "trace": trace, "view": view, "tracking": tracking}
    return execute(config, out, model=model, task=task, **how).circuit


def execute(
    config: RunConfig,
    out: str | PathLike[str] | None,
    *,
    model: Any = None,
    task: str | Task | None = None,
    watch: Watch | None = None,
    command: str | None = None,
    streams: str | None = None,
    trace: str | PathLike[str] | None = None,
    view: bool = True,
    tracking: Tracking | None = None,
) -> Outcome:
    """Runs, resumes or loads the run that ``config`` describes.

    out: its folder, None to write nothing. model, task: objects in place of the names in ``config``.
    command: what was typed, for the record. streams, trace, view, tracking: see ``discover``.
    Raises PahqError for bad input.
    """
    watch = Watch() if watch is None else watch
    model = config.model if model is None else model
    prompts_of = task if isinstance(task, Task) else task_of(config.task, task_options(config))
    config = replace(absolute(config), metric=metric_of(config.metric, prompts_of))
    policy, options = get_policy(config.policy, config.under_test), _method_options(config)
    device = device_of(config.device)
    policy.require(device, DTYPES[config.dtype])
    _check_extras(config, policy, streams, trace)
    path = trace_path(trace, None if out is None else Path(out))
    with ExitStack() as stack:
        scheduler = None
        if not get_method(config.method).scores_edges:
            scheduler = open_scheduler(device, streams, trace is not None)
        if scheduler is not None:
            stack.enter_context(scheduler)
        folder = None if out is None else stack.enter_context(RunFolder(out))
        if folder is not None:
            folder.check(config)
            folder.check_policy(config.policy, policy.to_dict())
            if folder.finished:
                return Outcome(Circuit.load(folder.path), read_json(folder.path / RUN_FILE), True)
        place = None if folder is None else folder.path
        tracker = stack.enter_context(open_tracker(tracking, place, "discover", config.to_dict(), watch.say))
        course = Course(config, options, policy, place, watch, scheduler, tracker)
        return _Run(course, folder, path, view).finish(model, prompts_of, command)


def _method_options(config: RunConfig) -> Any:
    """What the method takes, ACDC included; raises PahqError for options that it, or the prefilter, does not know."""
    if get_method(config.method).scores_edges:
        return get_method(config.method).options(config.method_options)
    if config.prefilter is not None:
        get_method(config.prefilter).options(config.method_options)
    return acdc_options(config)


def _check_extras(config: RunConfig, policy: Policy, streams: str | None, trace: Any) -> None:
    """Raises PahqError for what only a sweep has, or a sweep with a prefilter has not."""
    if get_method(config.method).scores_edges:
        for name, value in (("streams", streams), ("trace", trace)):
            if value is not None:
                raise PahqError(f"{name}: '{value}' goes with method acdc alone; leave it out with {config.method}")
    if config.prefilter is not None and policy.values:
        raise PahqError(
            f"prefilter: policy '{policy.name}' rounds values, with which a sweep starts from the full model; "
            "leave the prefilter out, or take fp32, pahq, bf16 or int8"
        )


def resume(
    out: str | PathLike[str],
    *,
    watch: Watch | None = None,
    command: str | None = None,
    streams: str | None = None,
    trace: str | PathLike[str] | None = None,
    view: bool = True,
    tracking: Tracking | None = None,
) -> Outcome:
    """Goes on with the run in ``out``, or loads it if it is finished; raises PahqError if none is there.

    The arguments are those of ``execute``.
    """
    if not Path(out).is_dir():
        raise PahqError(f"{out}: there is no such folder; give the --out of the run to go on with")
    with RunFolder(out, create=False) as folder:
        config = folder.config()
    assert config is not None
    for what in (config.model, config.task):
        if what.startswith(OBJECT):
            raise PahqError(
                f"{out}: the run was started from Python with a {what.removeprefix(OBJECT)} object; "
                "call pahq.discover with that object and the same out to go on"
            )
    how: dict[str, Any] = {"streams": streams, "trace": trace, "view": view, "tracking": tracking}
    return execute(config, out, watch=watch, command=command, **how)


class _Run:
    """The course of one run in this process."""

    def __init__(self, course: Course, folder: RunFolder | None, trace: Path | None, view: bool) -> None:
        self.course, self.folder, self.trace, self.view = course, folder, trace, view
        self.started = timestamp()

    def finish(self, model: Any, task: Task, command: str | None) -> Outcome:
        """Loads, searches, measures and writes."""
        course = self.course
        config, watch, scheduler = course.config, course.watch, course.scheduler
        command = config.call(None if self.folder is None else str(self.folder.path)) if command is None else command
        transformer = load(model, config, watch, course.policy, scheduler)
        prompts = task.prompts(transformer, config.n, config.seed, "validation")
        held_out, no_test = held_out_prompts(task, transformer, config)
        fingerprints = {"weights": identity.of_model(transformer), "prompts": identity.of_prompts(prompts)}
        self.facts = {
            "versions": machine.versions(),
            "commit": machine.commit(),
            "machine": machine.describe(transformer.device),
            "source": dict(transformer.source),
        }
        if self.folder is not None:
            facts = {"command": command, "started": self.started, "policy": course.policy.to_dict(), **self.facts}
            record = self.folder.begin(config, fingerprints, facts)
            self._compare_machines(record)
            self.started = record.get("started", self.started)
            command = record.get("command", command)
        course.tracker.started(
            {
                "command": command,
                "config": config.to_dict(),
                "precision": {"policy": course.policy.to_dict()},
                "identity": fingerprints,
                **self.facts,
            }
        )
        with traced(scheduler, self.trace, watch.say):
            found = self._search(model, transformer, prompts, task)
            watch.say("measuring the circuit …")
            circuit = Circuit(found.graph, found.mask, found.effects, found.order)
            figures = self._figures(transformer, circuit, task, prompts, held_out)
            metric = figures["validation"]["circuit"]["metric"] if found.metric is None else found.metric
            figures = {"final_metric": metric, **figures}
            if held_out is None:
                figures["test"] = {"missing": no_test}
            circuit.metadata.update({"config": config.to_dict(), "figures": figures})
            record = {
                "command": command,
                "config": config.to_dict(),
                "precision": found.precision,
                "identity": fingerprints,
                **self.facts,
                "started": self.started,
                "finished": timestamp(),
                "search": found.search,
                **found.more,
                "peak_memory": machine.peak_memory(transformer.device),
                "total_seconds": course.total_seconds,
            }
            if self.folder is not None:
                circuit.save(self.folder.path)
                write_json(self.folder.path / RUN_FILE, record)  # last: its presence says that the run is finished
                if self.view:
                    write_viewer(self.folder.path, circuit, record, transformer, prompts, watch)
            if course.tracker:
                facts = summary.as_json(circuit, record)
                del facts["config"]
                course.tracker.finished(facts, {"edges": circuit_table(circuit)}, result_files(course.folder))
            return Outcome(circuit, record, False)

    def _search(self, given: Any, model: Transformer, prompts: Prompts, task: Task) -> Found:
        """given: the model as it was asked for."""
        course, config = self.course, self.course.config
        if get_method(config.method).scores_edges:
            return score(course, model, prompts, task)
        if config.prefilter is None:
            return sweep(course, model, prompts)
        whole = model
        if isinstance(model.blocks, StreamedBlocks):  # gradients need all weights in place
            whole = load(given, config, course.watch, course.policy, None)
        options = get_method(config.prefilter).options(config.method_options)
        return sweep(course, model, prompts, prefilter(course, whole, prompts, task, options))

    def _figures(
        self, model: Transformer, circuit: Circuit, task: Task, prompts: Prompts, held_out: Prompts | None
    ) -> dict[str, Any]:
        """How the circuit behaves on the prompts it was chosen on, and on held-out ones if there are any."""
        metric, ablation = self.course.config.metric, self.course.config.ablation
        assert metric is not None
        splits = {"validation": prompts} | ({} if held_out is None else {"test": held_out})
        return {name: behaviour(model, circuit, task, part, metric, ablation) for name, part in splits.items()}

    def _compare_machines(self, record: dict[str, Any]) -> None:
        """Says so where a resumed run goes on with other software or threads, which can move a close decision."""
        for what in ("versions", "machine"):
            for name, now in self.facts[what].items():
                then = record.get(what, {}).get(name)
                if name in ("torch", "cpu", "threads", "device", "gpu") and then != now:
                    self.course.watch.say(
                        f"note: this run began with {name} {then}, now it is {now}; sums may round otherwise"
                    )
