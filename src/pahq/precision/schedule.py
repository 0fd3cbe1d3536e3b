"""Work on the streams ``load``, ``low`` and ``high``: what is issued where, and what waits for what.

PAHQ (Wang et al. 2025) copies the exact weights of the head under test on one stream, computes all heads in low
precision on a second and that head in FP32 on a third. A ``Scheduler`` is that idea with nothing else in it:
``submit`` issues a call on a stream after others, ``join`` makes the caller's own stream wait. Backends: CUDA
streams (``cuda``), the caller's thread or a worker thread a stream (``cpu``), and a clock alone (``virtual``).
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch

from pahq.errors import PahqError
from pahq.precision.trace import Trace

T = TypeVar("T")
STREAMS = ("load", "low", "high")
CALLER = "caller"
"""The lane of the caller's own stream (on a CPU: its thread), into which streams left out are folded."""


def parse_streams(text: str) -> tuple[str, ...]:
    """``"load,low,high"``, any of them, or ``"none"`` -> the streams in that order; raises PahqError for others."""
    names = [name.strip() for name in text.split(",")]
    if names == ["none"]:
        return ()
    for name in names:
        if name not in STREAMS:
            raise PahqError(f"streams: '{name}' is unknown; give any of {','.join(STREAMS)}, or none")
        if names.count(name) > 1:
            raise PahqError(f"streams: '{name}' is named twice; name it once")
    return tuple(name for name in STREAMS if name in names)


class Done(Generic[T]):
    """A call that was issued. ``value`` is what it gave, for those who waited for it.

    Who waited: the caller after ``join``, calls that named it in ``after``, and later work of its own stream.
    """

    __slots__ = ("error", "lane", "name", "number", "ready_on", "result", "scheduler", "stream", "ticket")

    def __init__(self, scheduler: Scheduler, name: str, stream: str, lane: str) -> None:
        self.scheduler, self.name, self.stream, self.lane = scheduler, name, stream, lane
        self.ready_on = {lane}
        self.number = scheduler.count()  # of two on one lane, the larger is the later
        self.ticket: Any = None  # the backend's: an event, a future, a time
        self.result: T | None = None
        self.error: Exception | None = None

    @property
    def value(self) -> T:
        """Raises AssertionError where nobody waited for it, and the call's own exception if it failed."""
        if self.scheduler.here not in self.ready_on:
            raise AssertionError(
                f"'{self.name}' of stream {self.stream} was used on {self.scheduler.here} without waiting for it; "
                "join it, or name it in after="
            )
        if self.error is not None:
            raise self.error
        return self.result  # pyright: ignore[reportReturnType]  (set by the call, unless it failed)

    def bare(self) -> Done[None]:
        """The same moment without value or failure, so that keeping it keeps no tensor alive."""
        moment: Done[None] = Done(self.scheduler, self.name, self.stream, self.lane)
        moment.ticket, moment.number = self.ticket, self.number
        return moment


class Scheduler(ABC):
    """See the module's text. Calls run without gradients; they may not submit or join themselves.

    ``low`` and ``high`` see everything that the caller's stream was given before. ``load`` does not wait for the
    caller (it could not run ahead otherwise): it may only read host memory and what ``after`` names.
    A call that raises fails its Done and all that come after it; join and ``value`` raise the original exception.
    Close it (or use it in a ``with``) when done.
    """

    def __init__(self, device: torch.device, streams: Sequence[str], trace: Trace | None = None) -> None:
        for name in streams:
            if name not in STREAMS:
                raise PahqError(f"streams: '{name}' is unknown; give any of {','.join(STREAMS)}, or none")
        self.device = device
        self.streams = tuple(name for name in STREAMS if name in streams)
        self.trace = trace
        self._thread = threading.local()
        self._closed = False
        self._count = 0

    @property
    def here(self) -> str:
        """The lane whose work is being done or issued."""
        return getattr(self._thread, "lane", CALLER)

    @property
    def running(self) -> int | None:
        """The number of the call that is being made on this thread, None outside of calls."""
        return getattr(self._thread, "running", None)

    def count(self) -> int:
        """The number of the next Done."""
        self._count += 1
        return self._count

    def lane(self, stream: str) -> str:
        """Where a stream's work is done: on itself, or by the caller where it was left out."""
        return stream if stream in self.streams else CALLER

    def submit(self, stream: str, name: str, call: Callable[[], T], after: Sequence[Done[Any]] = ()) -> Done[T]:
        """Issues ``call`` on a stream, after what that stream was given before and after ``after``.

        name: for the trace and for messages. Tensors that the call captured and those it gives stay allocated
        until every stream that was told of them is through; only a tensor reached through an attribute that the
        caller reassigns before the join is beyond what can be seen here.
        """
        if stream not in STREAMS:
            raise AssertionError(f"submit '{name}': there is no stream '{stream}'; known: {', '.join(STREAMS)}")
        self._check_caller(f"submit '{name}'", after)
        done: Done[T] = Done(self, name, stream, self.lane(stream))
        self._start(done, call, tuple(after))
        return done

    def join(self, *dones: Done[Any]) -> None:
        """Makes the caller's stream wait for ``dones``; raises the exception of the first that failed."""
        self._check_caller("join", dones)
        for done in dones:
            self._wait(done)
            done.ready_on.add(CALLER)
        for done in dones:
            if done.error is not None:
                raise done.error

    @abstractmethod
    def issued(self) -> tuple[Done[None], ...]:
        """All work so far that reads or writes tensors: the caller's own, and that of low and high."""

    def close(self) -> None:
        """Waits for everything issued; nothing can be submitted afterwards."""
        self._closed = True

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _start(self, done: Done[T], call: Callable[[], T], after: tuple[Done[Any], ...]) -> None: ...

    @abstractmethod
    def _wait(self, done: Done[Any]) -> None: ...

    def _check_caller(self, what: str, dones: Sequence[Done[Any]]) -> None:
        if self._closed:
            raise AssertionError(f"{what}: the scheduler is closed")
        if self.running is not None:
            raise AssertionError(f"{what}: not from inside a call (on {self.here}); submit the parts one by one")
        for done in dones:
            if done.scheduler is not self:
                raise AssertionError(f"{what}: '{done.name}' belongs to another scheduler")

    @contextlib.contextmanager
    def _inside(self, done: Done[Any]) -> Iterator[None]:
        self._thread.lane, self._thread.running = done.lane, done.number
        try:
            yield
        finally:
            self._thread.lane, self._thread.running = CALLER, None

    def _execute(self, done: Done[T], call: Callable[[], T], after: tuple[Done[Any], ...]) -> None:
        """Makes the call here and now, unless something it needs failed."""
        done.error = next((earlier.error for earlier in after if earlier.error is not None), None)
        if done.error is not None:
            return
        for earlier in after:
            earlier.ready_on.add(done.lane)
        try:
            with self._inside(done), torch.no_grad():
                done.result = call()
        except Exception as error:  # carried to whoever waits for it
            done.error = error


def make_scheduler(
    device: torch.device | str, streams: Sequence[str] = STREAMS, threads: bool = False, trace: Trace | None = None
) -> Scheduler:
    """The scheduler for a device.

    streams: those that exist; the work of the others is done by the caller's own stream, in order. threads: on a
    CPU, a worker thread for each (otherwise all calls run at once where they are submitted). trace: collects spans.
    Raises PahqError for unknown streams, and for threads on another device.
    """
    device = torch.device(device)
    if device.type == "cuda":
        from pahq.precision.cuda import CudaScheduler

        if threads:
            raise PahqError(f"streams: worker threads are for the CPU, not for {device}; leave threads out")
        return CudaScheduler(device, streams, trace)
    if device.type != "cpu":
        raise PahqError(f"streams: there is no scheduler for device '{device}'; use cpu or cuda")
    from pahq.precision.cpu import CpuScheduler

    return CpuScheduler(device, streams, threads, trace)
