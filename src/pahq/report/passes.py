"""What an evaluation has measured so far, kept beside its results so that it can go on after a kill.

One JSON line a pass, appended when the pass is over. A line says on what it was measured (by a fingerprint), so that
nothing is taken up that another model, prompt, metric or version gave. Floats are written in full: an evaluation that
goes on gives the same figures as one that was never stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pahq.files import naming, write_all

Sums = dict[str, list[float]]
"""Name of a figure -> its sum over the positions of each example."""


class PassesFile:
    """The file of one evaluation; ``of`` gives the passes on one set of examples.

    Lines that are torn or damaged do not count: their passes are run again. Raises PahqError where the file cannot
    be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._there = path.exists()
        self._file: BinaryIO | None = None
        self._known: dict[str, dict[str, Sums]] = {}
        if self._there:
            with naming(path):
                for line in path.read_bytes().split(b"\n"):
                    self._read(line)

    def of(self, about: Mapping[str, Any], examples: int) -> Passes:
        """The passes over so many examples. about: everything that decides what they give, JSON-ready."""
        on = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        fitting = {
            key: sums
            for key, sums in self._known.get(on, {}).items()
            if all(len(values) == examples for values in sums.values())
        }
        return Passes(self, on, fitting)

    def append(self, on: str, key: str, sums: Sums) -> None:
        with naming(self.path):
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (held until the evaluation is over)
                if self._there:  # what a killed process was writing ends here
                    self._file.write(b"\n")
            write_all(self._file.fileno(), (json.dumps({"on": on, "pass": key, "sums": sums}) + "\n").encode())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self, only_new: bool = False) -> None:
        """Takes the file away; only_new: unless it is an earlier process's."""
        self.close()
        if not (only_new and self._there):
            with contextlib.suppress(FileNotFoundError), naming(self.path):
                self.path.unlink(missing_ok=True)

    def _read(self, line: bytes) -> None:
        try:
            facts = json.loads(line)
            on, key, sums = facts["on"], facts["pass"], facts["sums"]
            good = all(math.isfinite(value) for values in sums.values() for value in values)
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        if good and isinstance(on, str) and isinstance(key, str):
            self._known.setdefault(on, {})[key] = sums


class Passes:
    """The finished passes on one set of examples, by the mask that was evaluated."""

    def __init__(self, file: PassesFile, on: str, known: dict[str, Sums]) -> None:
        self._file, self._on, self._known = file, on, known

    def __len__(self) -> int:
        return len(self._known)

    def load(self, mask: np.ndarray) -> Sums:
        """What is known of a mask bool [n_receivers, n_senders + 1]; nothing yet: empty."""
        return self._known.get(_key(mask), {})

    def save(self, mask: np.ndarray, sums: Mapping[str, np.ndarray]) -> None:
        """Keeps a finished pass. sums: float64 [N] by figure."""
        key = _key(mask)
        self._known[key] = {name: values.tolist() for name, values in sums.items()}
        self._file.append(self._on, key, self._known[key])


def _key(mask: np.ndarray) -> str:
    return hashlib.sha256(f"{mask.shape}".encode() + np.packbits(mask).tobytes()).hexdigest()
