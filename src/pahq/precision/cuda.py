"""The schedule on CUDA streams. Nothing here waits for the whole device; order is made of events alone.

PyTorch's allocator gives a freed block again to the stream it was made on, at once, trusting that this stream's own
order protects it. A tensor used on a second stream needs more. Two rules here cover all of it:

* what a call *captured* is referenced until the event behind the call has passed, so it cannot be freed earlier;
* what a call *gives* is marked (``record_stream``) for every stream that waits for it, so that a free waits for them.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.precision.schedule import CALLER, Done, Scheduler, T
from pahq.precision.trace import Trace

MOST_HELD = 4096
"""Calls issued but not yet through, at most; beyond it the host waits for the oldest (memory stays bounded)."""


_PLAIN = (bool, int, float, complex, str, bytes, np.ndarray, np.generic, torch.dtype, torch.device)
"""What holds no tensor."""


class Ticket(NamedTuple):
    """The moment behind a call: an event, and the handle of the stream it was recorded on."""

    event: torch.cuda.Event
    stream: int


class CudaScheduler(Scheduler):
    """Streams of one device. The caller's stream is the one that is current when it submits or joins."""

    def __init__(self, device: torch.device, streams: Sequence[str], trace: Trace | None = None) -> None:
        if not torch.cuda.is_available():
            raise PahqError(f"device '{device}': this machine or this torch has no CUDA; use cpu")
        super().__init__(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index),
                         streams, trace)  # fmt: skip
        # The head under test is little work that everything waits for: it goes first where blocks compete.
        self._streams = {
            name: torch.cuda.Stream(self.device, priority=-1 if name == "high" else 0) for name in self.streams
        }
        self._held: deque[tuple[torch.cuda.Event, Any]] = deque()
        self._last: dict[str, Done[None]] = {}
        if trace is not None:
            trace.start_cuda(self.device)

    def issued(self) -> tuple[Done[None], ...]:
        if not self._streams:
            return ()  # one stream alone is in order by itself
        moment: Done[None] = Done(self, "issued so far", "low", CALLER)
        moment.ticket = _record(torch.cuda.current_stream(self.device))
        return (*self._last.values(), moment)

    def close(self) -> None:
        super().close()
        for stream in self._streams.values():
            stream.synchronize()
        self._held.clear()

    def _start(self, done: Done[T], call: Callable[[], T], after: tuple[Done[Any], ...]) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise AssertionError(f"submit '{done.name}': a CUDA graph cannot be captured through the scheduler")
        here = torch.cuda.current_stream(self.device)
        stream = self._streams.get(done.lane, here)
        if done.lane not in (CALLER, "load") and stream != here:
            stream.wait_stream(here)  # the call's captured inputs were made there
        for earlier in after:
            _order(earlier, stream)
        held = (call, captured(call))
        with torch.cuda.stream(stream):
            begin = _timed(stream) if self.trace is not None else None
            self._execute(done, call, after)
            end = _timed(stream) if self.trace is not None else None
        if self.trace is not None and begin is not None and end is not None:
            self.trace.add_cuda(done.name, done.stream, begin, end, {"folded": True} if done.lane == CALLER else {})
        if not self._streams:
            return  # in order by itself: no events needed
        done.ticket = Ticket(end, stream.cuda_stream) if end is not None else _record(stream)
        if done.lane != CALLER:
            self._held.append((done.ticket.event, held))
            if done.lane != "load":
                self._last[done.lane] = done.bare()
        self._let_go()

    def _wait(self, done: Done[Any]) -> None:
        _order(done, torch.cuda.current_stream(self.device))
        self._let_go()

    def _let_go(self) -> None:
        """Drops what the calls captured whose events have passed."""
        if len(self._held) > MOST_HELD:
            self._held[0][0].synchronize()
        while self._held and self._held[0][0].query():
            self._held.popleft()


def _record(stream: torch.cuda.Stream) -> Ticket:
    event = torch.cuda.Event()
    event.record(stream)
    return Ticket(event, stream.cuda_stream)


def _timed(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def _order(earlier: Done[Any], stream: torch.cuda.Stream) -> None:
    """Work that ``stream`` is given from now on comes after ``earlier``, whose tensors it may use."""
    ticket: Ticket | None = earlier.ticket
    if ticket is None or ticket.stream == stream.cuda_stream:
        return
    stream.wait_event(ticket.event)
    for tensor in tensors(earlier.result):
        if tensor.is_cuda:
            tensor.record_stream(stream)


def tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors of a call's value: through sequences, mappings and the attributes of objects.

    Raises AssertionError for something it cannot look into, since a tensor in there would go unprotected.
    """
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif value is None or isinstance(value, _PLAIN) or id(value) in seen:
        return
    elif isinstance(value, (Mapping, list, tuple, set, frozenset)) or hasattr(value, "__dict__"):
        seen.add(id(value))  # objects may refer to each other in circles
        if isinstance(value, Mapping):
            value = list(value.values())
        elif not isinstance(value, (list, tuple, set, frozenset)):
            value = list(vars(value).values())
        for part in value:
            yield from tensors(part, seen)
    else:
        raise AssertionError(f"scheduler: a call gave a {type(value).__name__}, whose tensors cannot be found")


def captured(call: Callable[..., Any], seen: frozenset[int] = frozenset()) -> tuple[Any, ...]:
    """What a call can reach now: the caller may rebind its names, or empty its lists, before the call is through."""
    seen |= {id(call)}  # functions may capture each other
    if isinstance(call, functools.partial):
        return (*captured(call.func, seen), *(_kept(value) for value in (*call.args, *call.keywords.values())))
    function = getattr(call, "__func__", call)
    found = [getattr(call, "__self__", None)]
    found += [_kept(getattr(function, name, None)) for name in ("__defaults__", "__kwdefaults__")]
    for cell in getattr(function, "__closure__", None) or ():
        try:
            content = cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue
        found.append(_kept(content))
        if isinstance(content, FunctionType) and id(content) not in seen:
            found.append(captured(content, seen))
    return tuple(found)


def _kept(value: Any) -> Any:
    if isinstance(value, (list, tuple, set)):
        return tuple(_kept(part) for part in value)
    return tuple(_kept(part) for part in value.values()) if isinstance(value, dict) else value
