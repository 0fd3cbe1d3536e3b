"""From the options of a run to device, model, prompts and metric. Bad input ends here, in one line."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pahq.errors import PahqError
from pahq.evaluation.truth.base import INTERPBENCH, OWN, load_truth
from pahq.method.acdc import AcdcOptions
from pahq.model import Transformer, load_model
from pahq.precision.policy import Policy, get_policy
from pahq.precision.schedule import Scheduler
from pahq.precision.streamed import streamed
from pahq.report.config import RunConfig
from pahq.report.progress import Watch
from pahq.task import Task, get_task
from pahq.task.metrics import metric_class
from pahq.task.prompts import Prompts

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def task_options(config: RunConfig) -> dict[str, Any]:
    return config.task_options | ({"pad": True} if config.pad else {})


def task_of(name: str, options: dict[str, Any]) -> Task:
    """A task by its name or file, or the prompts of a known circuit by the circuit's name (``trained-sum``).

    Raises PahqError for what is unknown, and for options that the task lacks.
    """
    if not name.startswith(OWN):
        return get_task(name, **options)
    for option in options:
        raise PahqError(f"task '{name}': option '{option}' is unknown; it has none")
    return load_truth(name).task()


def acdc_options(c: RunConfig) -> AcdcOptions:
    assert c.metric is not None
    assert c.threshold is not None
    names = ("absolute", "ablation", "head_order", "sender_order", "split_qkv", "direct_edges", "split_pos", "exact")
    policy = get_policy(c.policy, c.under_test)
    given = {name: getattr(c, name) for name in names}
    return AcdcOptions(threshold=c.threshold, metric=c.metric, policy=policy, **given)


def device_of(name: str) -> torch.device:
    """Raises PahqError for a device that is not there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise PahqError(f"device: '{name}' cannot be used ({reason}); take cpu") from error


def load(model: Any, config: RunConfig, watch: Watch, policy: Policy, scheduler: Scheduler | None) -> Transformer:
    """The model in the configuration's type on its device; of a known circuit by the circuit's name.

    On a GPU, a policy of low precision leaves the FP32 weights in host memory, from where they are streamed.
    """
    if scheduler is not None and scheduler.device.type == "cuda" and not policy.is_fp32:
        host = load(model, replace(config, device="cpu"), watch, policy, None)
        return streamed(host, scheduler.device, scheduler)
    dtype, changes = DTYPES[config.dtype], ("fold_ln", "center_writing", "center_unembed", "fold_value_biases")
    asked = [option for option in changes if getattr(config, option)]
    if isinstance(model, Transformer):
        if asked:
            raise PahqError(f"{asked[0]}: the model is loaded already; give the option to load_model instead")
        return model.to(config.device, dtype)
    watch.say(f"loading {config.model} …")
    if isinstance(model, str) and model.startswith(OWN):
        if asked:
            raise PahqError(f"{asked[0]}: '{model}' is taken as it is known; leave the option out")
        return load_truth(model).model().to(config.device, dtype)
    return load_model(
        model,
        device=config.device,
        dtype=dtype,
        fold_ln=config.fold_ln,
        center_writing=config.center_writing,
        center_unembed=config.center_unembed,
        fold_value_biases=config.fold_value_biases,
    )


def absolute(config: RunConfig) -> RunConfig:
    """Files and folders by their whole path, so that a run can be resumed from anywhere."""
    paths = {}
    for name in ("model", "task", "policy"):
        spec = getattr(config, name)
        # A plain word is a model's, task's or policy's name, even where a folder happens to be called the same.
        if ("/" in spec or "." in spec) and Path(spec).exists():
            paths[name] = str(Path(spec).resolve())
        case = spec.removeprefix(INTERPBENCH)
        if case != spec and Path(case).is_dir():
            paths[name] = f"{INTERPBENCH}{Path(case).resolve()}"
    return replace(config, **paths)


def metric_of(asked: str | None, task: Task) -> str:
    """The metric's name; raises PahqError for one that is unknown or does not fit the task."""
    if asked is None:
        return task.default_metric
    metric_class(asked)
    if asked.partition(":")[0] not in task.metrics:
        raise PahqError(f"metric '{asked}' does not fit task {task.name}; choose one of {', '.join(task.metrics)}")
    return asked


def held_out_prompts(task: Task, model: Transformer, config: RunConfig) -> tuple[Prompts | None, str]:
    """As many test prompts as were asked for, or the reason why there are none."""
    try:
        return task.prompts(model, config.n, config.seed, "test"), ""
    except PahqError as error:
        return None, str(error)


def timestamp() -> str:
    """The time as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
