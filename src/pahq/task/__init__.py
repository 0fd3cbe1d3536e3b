"""Tasks: behaviours to explain, as clean and corrupted prompt pairs with right and wrong answers."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from pahq.errors import PahqError
from pahq.task.base import SPLITS, GeneratedTask, Task
from pahq.task.ioi import Ioi
from pahq.task.prompts import Prompts
from pahq.task.score import accuracy, logit_difference, read_logits

__all__ = [
    "SPLITS",
    "Prompts",
    "Task",
    "accuracy",
    "get_task",
    "list_tasks",
    "logit_difference",
    "read_logits",
]

_BUILT_IN: dict[str, type[GeneratedTask]] = {cls.name: cls for cls in (Ioi,)}


def list_tasks() -> list[Task]:
    """The built-in tasks, with their default options."""
    return [cls() for cls in _BUILT_IN.values()]


def get_task(name_or_path: str, **options: Any) -> Task:
    """A built-in task by name.

    Raises PahqError for an unknown name or option.
    """
    name = str(name_or_path)
    if name not in _BUILT_IN:
        near = get_close_matches(name, _BUILT_IN, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(_BUILT_IN)}"
        raise PahqError(f"task '{name}' is unknown; {hint}")
    cls = _BUILT_IN[name]
    known = [field.name for field in fields(cls)]
    for option in options:
        if option not in known:
            raise PahqError(f"task '{name}': option '{option}' is unknown; it has {', '.join(known)}")
    return cls(**options)
