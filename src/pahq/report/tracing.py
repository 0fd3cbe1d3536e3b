"""The streams of a run, and the file that shows what was done on them: neither changes the run's result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path

import torch

from pahq.errors import PahqError
from pahq.precision.schedule import STREAMS, Scheduler, make_scheduler, parse_streams
from pahq.precision.trace import Trace


def open_scheduler(device: torch.device, streams: str | None, traced: bool) -> Scheduler | None:
    """The scheduler of a run; None on devices that have none, if neither streams nor a trace were asked for.

    streams: as typed, None for all. traced: on a CPU streams are threads then, so that the trace shows them at work
    together. Raises PahqError for unknown streams, and where the device has no scheduler.
    """
    if streams is None and not traced and device.type not in ("cpu", "cuda"):
        return None
    names = STREAMS if streams is None else parse_streams(streams)
    threads = traced and device.type == "cpu"
    return make_scheduler(device, names, threads, Trace() if traced else None)


def trace_path(trace: str | PathLike[str] | None, out: Path | None) -> Path | None:
    """Where a trace is to be written; raises PahqError at once where that could not be done at the end.

    out: the run's folder, which may not be there yet.
    """
    if trace is None:
        return None
    path = Path(trace).absolute()
    if path.is_dir():
        raise PahqError(f"trace: {path} is a folder; give the name of a file")
    if not path.parent.is_dir() and (out is None or path.parent != out.absolute()):
        raise PahqError(f"trace: there is no folder {path.parent}; make it, or choose another")
    return path


@contextlib.contextmanager
def traced(scheduler: Scheduler | None, path: Path | None, say: Callable[[str], None]) -> Iterator[None]:
    """Writes the scheduler's trace to ``path`` at the end of the block, also when that is interrupted or fails.

    say: is told if nothing ran on the streams, as under policies that have no use for them.
    """
    trace = None if scheduler is None else scheduler.trace
    if trace is None or path is None:
        yield
        return
    try:
        yield
    except BaseException:
        with contextlib.suppress(PahqError):  # what ended the run matters more
            trace.write(path)
        raise
    trace.write(path)
    if not trace.spans():
        say(f"note: nothing ran on the streams; {path} is an empty trace")
