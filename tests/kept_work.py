"""A method's work as tests want it: everything told is noted, and any save can be made the last before a kill."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Killed(Exception):
    """Raised in place of what came after the save."""


class Kept:
    """Keeps what a method saves as a run folder would: tensors by copy, facts through JSON.

    kill_after: how many saves there are before the work is killed, None for never.
    """

    def __init__(self, kill_after: int | None = None) -> None:
        self.kill_after, self.saves = kill_after, 0
        self.told: list[tuple[int, int]] = []
        self.state: tuple[dict[str, Tensor], str] | None = None

    def progress(self, done: int, total: int) -> None:
        assert 0 <= done <= total
        if self.told:
            assert total == self.told[-1][1]
        self.told.append((done, total))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if self.state is None:
            return None
        tensors, facts = self.state
        return {name: value.clone() for name, value in tensors.items()}, json.loads(facts)

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.state = {name: value.detach().cpu().clone() for name, value in tensors.items()}, json.dumps(dict(facts))
        self.saves += 1
        if self.kill_after is not None and self.saves >= self.kill_after:
            self.kill_after = None
            raise Killed
