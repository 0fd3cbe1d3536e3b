"""Tasks: behaviours to explain, as clean and corrupted prompt pairs with right and wrong answers."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from pahq.errors import PahqError, choices
from pahq.task.base import SPLITS, Task
from pahq.task.custom import FileTask
from pahq.task.docstring import Docstring
from pahq.task.files import SUFFIXES
from pahq.task.greaterthan import GreaterThan
from pahq.task.induction import Induction
from pahq.task.ioi import Ioi
from pahq.task.prompts import Prompts
from pahq.task.score import accuracy, logit_difference, read_logits
from pahq.task.short import Agreement, Capital, Pronoun

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

_BUILT_IN: dict[str, Any] = {
    cls.name: cls for cls in (Ioi, GreaterThan, Docstring, Induction, Pronoun, Capital, Agreement)
}


def list_tasks() -> list[Task]:
    """The built-in tasks, with their default options."""
    return [cls() for cls in _BUILT_IN.values()]


def get_task(name_or_path: str | Path, **options: Any) -> Task:
    """A built-in task by name, or the task of a file of prompt pairs (.jsonl, .csv, .json; see ``FileTask``).

    Raises PahqError for an unknown name or option, a missing file, and whatever is wrong in the file.
    """
    name = str(name_or_path)
    path = Path(name)
    if name in _BUILT_IN:
        cls: Any = _BUILT_IN[name]
        arguments = dict(options)
    elif path.suffix.lower() in SUFFIXES:
        if not path.is_file():
            raise PahqError(f"task file {name}: there is no such file; check the path")
        cls, arguments = FileTask, {"path": path, **options}
    else:
        if path.is_file():
            ending = f"ends in '{path.suffix}'" if path.suffix else "has no ending"
            raise PahqError(f"task file {name}: its name {ending}; let it end in one of {', '.join(SUFFIXES)}")
        hint = choices(name, _BUILT_IN, "choose one of")
        raise PahqError(f"task '{name}' is unknown; {hint} (or give a file: {', '.join(SUFFIXES)})")
    known = {field.name: type(field.default) for field in fields(cls) if field.init and field.name != "path"}
    for option, value in options.items():
        if option not in known:
            raise PahqError(f"task '{name}': option '{option}' is unknown; it has {', '.join(known)}")
        if type(value) is not known[option]:
            raise PahqError(
                f"task '{name}': option {option} is {value!r}; give a value of type {known[option].__name__}"
            )
    return cls(**arguments)
