"""Stands in for ``torch.cuda``'s streams and events: nothing runs, but what must come before what is known.

Every operation is a node; it comes after the one before it on its stream and after the events the stream waited for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch


class World:
    """All operations so far. ``before[i]``: the operations that must have ended when operation i begins."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.before: list[frozenset[int]] = []
        self.main = Stream(self)
        self.current = self.main
        self.passed = False  # what events answer when asked
        self.synchronized = 0

    def do(self, name: str) -> int:
        """One operation on the current stream."""
        stream = self.current
        self.names.append(name)
        self.before.append(frozenset(stream.known))
        stream.known.add(len(self.names) - 1)
        return len(self.names) - 1

    def ordered(self, one: str, other: str) -> bool:
        """Whether every operation ``one`` must have ended before any ``other`` begins."""
        ones, others = ([i for i, name in enumerate(self.names) if name == wanted] for wanted in (one, other))
        assert ones, one
        assert others, other
        return all(i in self.before[j] for i in ones for j in others)


class Stream:
    def __init__(self, world: World, device: Any = None, priority: int = 0) -> None:
        self.world, self.known = world, set[int]()
        self.cuda_stream = id(self)

    def wait_stream(self, other: Stream) -> None:
        self.known |= other.known

    def wait_event(self, event: Event) -> None:
        assert event.known is not None, "an event is waited for that was never recorded"
        self.known |= event.known

    def synchronize(self) -> None:
        self.world.synchronized += 1


class Event:
    def __init__(self, world: World, enable_timing: bool = False) -> None:
        self.world, self.timed, self.known = world, enable_timing, None

    known: frozenset[int] | None

    def record(self, stream: Stream) -> None:
        self.known = frozenset(stream.known)

    def query(self) -> bool:
        return self.world.passed

    def synchronize(self) -> None:
        self.world.synchronized += 1

    def elapsed_time(self, other: Event) -> float:
        assert self.timed
        assert other.timed
        assert self.known is not None
        assert other.known is not None
        return float(len(other.known) - len(self.known))


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device, and remembers the streams it was marked for."""

    marks: set[int]

    @property
    def is_cuda(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  (torch's is an attribute)
        return True

    def record_stream(self, s: Any) -> None:
        self.marks.add(s.cuda_stream)


def on_device() -> OnDevice:
    tensor = torch.zeros(1).as_subclass(OnDevice)
    tensor.marks = set()
    return tensor


def install(monkeypatch: pytest.MonkeyPatch) -> World:
    """Puts the stand-ins in place of ``torch.cuda``'s for one test."""
    world = World()

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, world.current = world.current, stream
        try:
            yield
        finally:
            world.current = before

    stand_ins = {
        "Stream": lambda device=None, priority=0: Stream(world, device, priority),
        "Event": lambda enable_timing=False: Event(world, enable_timing),
        "stream": on,
        "current_stream": lambda device=None: world.current,
        "current_device": lambda: 0,
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return world
