"""The schedule on a CPU: calls run at once where they are submitted, or on a worker thread a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from pahq.precision.schedule import CALLER, Done, Scheduler, T
from pahq.precision.trace import Trace


class CpuScheduler(Scheduler):
    """threads: one worker thread for each of ``streams``; work of other streams waits and runs on the caller's."""

    def __init__(
        self, device: torch.device, streams: Sequence[str], threads: bool = False, trace: Trace | None = None
    ) -> None:
        super().__init__(device, streams, trace)
        # One thread each: a pool of one works through its queue in order, which is what makes it a stream.
        self._workers = {
            name: ThreadPoolExecutor(1, thread_name_prefix=f"pahq-{name}") for name in self.streams if threads
        }
        self._last: dict[str, Done[None]] = {}

    def issued(self) -> tuple[Done[None], ...]:
        return tuple(self._last.values())

    def close(self) -> None:
        super().close()
        for worker in self._workers.values():
            worker.shutdown(wait=True, cancel_futures=True)

    def _start(self, done: Done[T], call: Callable[[], T], after: tuple[Done[Any], ...]) -> None:
        worker = self._workers.get(done.lane)
        if worker is None:
            self._work(done, call, after)
            return
        done.ticket = worker.submit(self._work, done, call, after)
        if done.lane != "load":
            self._last[done.lane] = done.bare()

    def _work(self, done: Done[T], call: Callable[[], T], after: tuple[Done[Any], ...]) -> None:
        # Waiting cannot deadlock: what is waited for was submitted earlier, and every stream works in order.
        for earlier in after:
            self._wait(earlier)
        begin = time.perf_counter_ns()
        self._execute(done, call, after)
        if self.trace is not None:
            self.trace.add(done.name, done.stream, begin, time.perf_counter_ns(), _args(done))

    def _wait(self, done: Done[Any]) -> None:
        ticket: Future[None] | None = done.ticket
        if ticket is not None:
            ticket.result()


def _args(done: Done[Any]) -> dict[str, Any]:
    """What a span tells beyond its name and times."""
    return {"folded": True} if done.lane == CALLER else {}
