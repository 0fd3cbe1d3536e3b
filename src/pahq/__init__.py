"""Automatic circuit discovery for transformer language models.

>>> import pahq
>>> circuit = pahq.discover(model="smollm2-135m", task="ioi", threshold=0.05)  # doctest: +SKIP

Names are looked up on first use, so that ``import pahq`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pahq.errors import PahqError

if TYPE_CHECKING:
    from pahq.api import discover
    from pahq.assessment import compare, evaluate
    from pahq.evaluation.circuit import Circuit
    from pahq.model import load_model
    from pahq.report.tracking.settings import Tracking
    from pahq.sweeps.sweep import sweep
    from pahq.task import get_task, list_tasks
    from pahq.viewing import view

__all__ = [
    "Circuit",
    "PahqError",
    "Tracking",
    "compare",
    "discover",
    "evaluate",
    "get_task",
    "list_tasks",
    "load_model",
    "sweep",
    "view",
]

_HOMES = {
    "discover": "pahq.api",
    "evaluate": "pahq.assessment",
    "compare": "pahq.assessment",
    "sweep": "pahq.sweeps.sweep",
    "view": "pahq.viewing",
    "Circuit": "pahq.evaluation.circuit",
    "load_model": "pahq.model",
    "Tracking": "pahq.report.tracking.settings",
    "get_task": "pahq.task",
    "list_tasks": "pahq.task",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pahq' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
