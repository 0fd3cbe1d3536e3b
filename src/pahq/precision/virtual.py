"""The schedule on a clock alone: when each call would begin and end, given what it would cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pahq.precision.schedule import CALLER, Done, Scheduler, T
from pahq.precision.trace import Trace


@dataclass(frozen=True)
class Cost:
    """Seconds a call keeps its stream busy, and seconds the host takes to issue it."""

    device: float
    host: float = 0.0


class VirtualScheduler(Scheduler):
    """A call gives its ``Cost`` here instead of doing its work.

    A call begins when the host comes to it, its stream is free and everything it comes after has ended; it ends when
    its work is done, and not before the host has issued all of it. A copy whose stream is folded is synchronous: the
    host waits for it, as it does for a plain copy. ``finish`` gives the time.
    """

    def __init__(self, streams: Sequence[str], trace: Trace | None = None) -> None:
        super().__init__(torch.device("cpu"), streams, trace)
        self.host = 0.0
        self._free: dict[str, float] = dict.fromkeys((CALLER, *self.streams), 0.0)

    def issued(self) -> tuple[Done[None], ...]:
        moments = []
        for lane, time in self._free.items():
            if lane != "load":
                moment: Done[None] = Done(self, "issued so far", "low", lane)
                moment.ticket = time
                moments.append(moment)
        return tuple(moments)

    def read(self, done: Done[Any]) -> None:
        """The host waits for one call, as it does to read a result."""
        self.host = max(self.host, done.ticket)

    def finish(self) -> float:
        """Waits for every stream; seconds since the start."""
        self.host = max(self.host, *self._free.values())
        return self.host

    def _start(self, done: Done[T], call: Callable[[], T], after: tuple[Done[Any], ...]) -> None:
        self._execute(done, call, after)
        cost = done.result
        if done.error is not None:
            raise done.error
        if not isinstance(cost, Cost):
            raise AssertionError(f"submit '{done.name}': on a clock alone a call gives its Cost, not {type(cost)}")
        begin = max(self.host, self._free[done.lane], *(earlier.ticket for earlier in after))
        if done.lane not in (CALLER, "load"):
            begin = max(begin, self._free[CALLER])
        self.host += cost.host
        end = max(begin + cost.device, self.host)
        done.ticket = self._free[done.lane] = end
        if done.stream == "load" and done.lane == CALLER:
            self.host = max(self.host, end)
        if self.trace is not None:
            self.trace.add(done.name, done.stream, round(begin * 1e9), round(end * 1e9), {"modelled": True})

    def _wait(self, done: Done[Any]) -> None:
        self._free[CALLER] = max(self._free[CALLER], done.ticket)
