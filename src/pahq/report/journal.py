"""The journal of a run: one JSON line a decision, appended as decisions are taken.

Lines are handed to the operating system after every batch, so a killed process loses at most the
batch it was computing, and the line that it was writing. Floats are written in full (``repr``), so
that they read back bit for bit. A line with ``spent`` records the work done so far; disagreements that a check
found (``method.check``) stand in the line of the batch that had them, and are gathered when the journal is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.files import naming, write_all, write_atomic
from pahq.method.acdc import Decision

JOURNAL_FILE = "journal.jsonl"
_NUMBERS: dict[str, tuple[type, ...]] = {
    "order": (int,),
    "row": (int,),
    "column": (int,),
    "before": (int, float),
    "after": (int, float),
    "kept": (bool,),
    "checkpoint": (bool,),
}
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "refined": (bool,),
    "error": (int, float),
    "moved": (int, float),
}
"""What low precision adds; left out where it has nothing to say."""


def to_line(decision: Decision, name: str) -> str:
    """A decision as a JSON line, the edge's name first for the human reader."""
    facts = {
        "edge": name,
        "order": decision.order,
        "row": decision.row,
        "column": decision.column,
        "before": decision.before,
        "after": decision.after,
        "kept": decision.kept,
        "checkpoint": decision.checkpoint,
    }
    if decision.refined:
        facts["refined"] = True
    for name in ("error", "moved"):
        if getattr(decision, name) is not None:
            facts[name] = getattr(decision, name)
    return json.dumps(facts) + "\n"


class Journal:
    """Appends decisions to ``path``, which ``cut`` has brought in order where a run goes on.

    edge_name: (row, column) -> the edge's readable name.
    """

    def __init__(self, path: Path, edge_name: Callable[[int, int], str]) -> None:
        self.path, self.edge_name = path, edge_name
        with naming(path):
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (held for the length of the run)

    def append(self, decisions: Sequence[Decision], spent: dict[str, Any]) -> None:
        """Writes a batch of decisions and the work spent so far; raises PahqError where the disk refuses."""
        lines = [to_line(decision, self.edge_name(decision.row, decision.column)) for decision in decisions]
        with naming(self.path):
            write_all(self._file.fileno(), ("".join(lines) + json.dumps({"spent": spent}) + "\n").encode())

    def close(self) -> None:
        """Closes the file, after asking the disk to keep it."""
        with naming(self.path):
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read(path: Path, finished: bool = False) -> tuple[list[Decision], dict[str, Any]]:
    """The decisions in ``path`` up to the last checkpoint, and the work spent on everything in it.

    finished: the run is over, and what comes after its last checkpoint belongs to it. A torn last line is dropped.
    Raises PahqError for damage anywhere else, naming the line.
    """
    decisions: list[Decision] = []
    spent: dict[str, Any] = {}
    disagreements: list[dict[str, Any]] = []
    if not path.exists():
        return decisions, spent
    with naming(path):
        lines = path.read_bytes().split(b"\n")
    whole = lines[:-1]  # a whole line ends in a newline, so the rest after the last one is torn
    for number, line in enumerate(whole, start=1):
        facts = _parse(line)
        if facts is not None and _is_spent(facts.get("spent")):
            spent = facts["spent"]
            disagreements += spent.pop("disagreements", [])
            continue
        decision = None if facts is None else _decision(facts)
        if decision is None or decision.order != len(decisions):
            if number == len(whole):  # the newline got to the disk, the text before it did not
                break
            raise PahqError(f"{path}: line {number} is damaged; start the run anew in another folder")
        decisions.append(decision)
    while decisions and not (finished or decisions[-1].checkpoint):
        decisions.pop()
    # What was found beyond the last checkpoint will be found again.
    disagreements = [found for found in disagreements if found["order"] < len(decisions)]
    return decisions, spent | ({"disagreements": disagreements} if disagreements else {})


def cut(path: Path, decisions: Sequence[Decision], spent: dict[str, Any], edge_name: Callable[[int, int], str]) -> None:
    """Rewrites ``path`` at once so that it holds exactly ``decisions`` and the work spent."""
    lines = [to_line(decision, edge_name(decision.row, decision.column)) for decision in decisions]
    write_atomic(path, ("".join(lines) + (json.dumps({"spent": spent}) + "\n" if spent else "")).encode())


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        facts = json.loads(line)
    except ValueError:
        return None
    return facts if isinstance(facts, dict) else None


def _is_spent(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    found = value.get("disagreements", [])
    return isinstance(found, list) and all(isinstance(one, dict) and type(one.get("order")) is int for one in found)


def _decision(facts: dict[str, Any]) -> Decision | None:
    """None where a field is missing or of the wrong type (``True`` is no number here)."""
    for name, types in _NUMBERS.items():
        if type(facts.get(name)) not in types:
            return None
    there = {name: facts[name] for name in _OPTIONAL if name in facts}
    if any(type(value) not in _OPTIONAL[name] for name, value in there.items()) or ("error" in there) != (
        "moved" in there
    ):
        return None
    return Decision(**{name: facts[name] for name in _NUMBERS}, **there)
