"""What a method that scores edges leaves in a run's folder: its progress, and its scores once it is done.

``state.safetensors`` holds what the method needs to go on (``method.base.Work``) and goes when the scores are there;
``scores.safetensors`` stays.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.files import naming, write_atomic
from pahq.graph import Graph
from pahq.method.base import Scores
from pahq.report.steps import Steps
from pahq.report.tracking.tracker import Tracker

STATE_FILE, SCORES_FILE = "state.safetensors", "scores.safetensors"
STATE_FORMAT, SCORES_FORMAT = "pahq-state-1", "pahq-scores-1"
SHARE = 0.05
"""Share of the time that writing the state may take."""


class FolderWork:
    """``method.base.Work`` that shows and tracks progress, and keeps state in ``folder`` if there is one.

    seconds, resumes: of the work so far, over all processes that took part; before: seconds of earlier ones.
    """

    def __init__(self, folder: Path | None, method: str, steps: Steps, tracker: Tracker | None = None) -> None:
        self.path = None if folder is None else folder / STATE_FILE
        self.tracker = Tracker() if tracker is None else tracker
        self.method, self.steps = method, steps
        self.resumes, self.before, self._loaded = 0, 0.0, False
        self._began = time.monotonic()
        self._due = 0.0  # when the state may be written again

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self._began

    def progress(self, done: int, total: int) -> None:
        self.steps.step(self.method, done, total)
        self.tracker.progress(self.method, {"done": done, "of": total, "seconds": self.seconds})

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept; raises PahqError for a damaged file or one of another method."""
        if self.path is None or not self.path.exists():
            return None
        tensors, facts = _read(self.path, STATE_FORMAT)
        if facts.get("method") != self.method or not isinstance(facts.get("facts"), dict):
            raise PahqError(f"{self.path}: the file is damaged or of another method; remove it to start anew")
        if not self._loaded:  # a method may ask again
            self.before, self.resumes = float(facts.get("seconds", 0.0)), int(facts.get("resumes", 0)) + 1
            self.steps.watch.say(f"going on with {self.method} after {self.before:.0f} s")
        self._loaded = True
        return tensors, facts["facts"]

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keeps the state, but not so often that writing takes more than ``SHARE`` of the time."""
        began = time.monotonic()
        self._loaded = True  # what is there from now on is this process's own
        if self.path is None or began < self._due:
            return
        record = {"method": self.method, "facts": dict(facts), "seconds": self.seconds, "resumes": self.resumes}
        _write(self.path, tensors, STATE_FORMAT, record)
        end = time.monotonic()
        self._due = end + (end - began) / SHARE

    def finish(self) -> None:
        """The scores are kept: the state has served its turn."""
        if self.path is not None:
            with naming(self.path):
                self.path.unlink(missing_ok=True)


def save_scores(folder: Path, scores: Scores, spent: Mapping[str, Any]) -> None:
    """Writes ``scores.safetensors``: ``scores`` float64 [n_receivers, n_senders + 1], all else as metadata."""
    facts = {
        "method": scores.method,
        "signed": scores.signed,
        "natural": scores.natural,
        "notes": list(scores.notes),
        "stats": dict(scores.stats),
        "spent": dict(spent),
    }
    values = torch.from_numpy(np.ascontiguousarray(scores.values, dtype=np.float64))
    _write(folder / SCORES_FILE, {"scores": values}, SCORES_FORMAT, facts)


def load_scores(folder: Path, graph: Graph, method: str) -> tuple[Scores, dict[str, Any]] | None:
    """What ``save_scores`` wrote, None if it did not yet. Raises PahqError for a damaged file."""
    path = folder / SCORES_FILE
    if not path.exists():
        return None
    tensors, facts = _read(path, SCORES_FORMAT)
    try:
        if facts["method"] != method:
            raise PahqError(f"{path}: holds scores of {facts['method']}, not of {method}; choose another folder")
        values, spent, notes = tensors["scores"].numpy(), facts.pop("spent"), tuple(facts.pop("notes"))
        return Scores(graph, values, notes=notes, **facts), dict(spent)
    except (KeyError, TypeError) as error:
        raise PahqError(f"{path}: the file is damaged ({error}); remove it to score anew") from error


def _write(path: Path, tensors: Mapping[str, Tensor], form: str, facts: Mapping[str, Any]) -> None:
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": form, "facts": json.dumps(facts, allow_nan=False)}
    write_atomic(path, safetensors.torch.save(own, metadata))


def _read(path: Path, form: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a file that ``_write`` wrote; raises PahqError for anything else."""
    try:
        with naming(path), safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        facts = json.loads(metadata.get("facts", ""))
    except (safetensors.SafetensorError, ValueError) as error:
        raise PahqError(f"{path}: not a whole file of pahq's ({error}); remove it to start anew") from error
    if metadata.get("format") != form or not isinstance(facts, dict):
        raise PahqError(f"{path}: the file is damaged or of another version of pahq; remove it to start anew")
    return tensors, facts
