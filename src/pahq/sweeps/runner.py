"""Runs as processes, several at a time. A run that fails, crashes or is killed stops no other."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pahq.errors import PahqError
from pahq.files import encoded, explain, naming
from pahq.inputs import timestamp
from pahq.report.folder import RUN_FILE
from pahq.sweeps.board import Board
from pahq.sweeps.progress import Meter
from pahq.sweeps.runs import Run
from pahq.sweeps.status import SweepFolder

JOB = (sys.executable, "-m", "pahq.sweeps.job")
"""Command of a run's process; what follows ``pahq`` follows it."""
POLL = 0.1
"""Seconds between two looks at the processes."""
GRACE = 20.0
"""Seconds that an interrupted run has to put its files in order."""


def threads_for(jobs: int) -> int:
    """Threads of one of ``jobs`` processes: what OMP_NUM_THREADS says, or its share of this process's cores."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said) > 0:
        return int(said)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)


@dataclass
class Job:
    """A run's process. start: where in the log what it says begins."""

    run: Run
    process: subprocess.Popen[bytes]
    log: Path
    start: int
    meter: Meter


class Runner:
    """Runs what ``folder`` has as waiting or interrupted, in the order of ``runs``."""

    def __init__(self, folder: SweepFolder, runs: Sequence[Run], jobs: int, board: Board) -> None:
        self.folder, self.jobs, self.board = folder, jobs, board
        self.threads = threads_for(jobs)
        self.waiting = [run for run in runs if folder.rows[run.name]["state"] in ("waiting", "interrupted")]
        self.running: list[Job] = []

    def run(self) -> None:
        """Returns once all runs are done or failed; on Ctrl-C, and on any error, ends the processes and raises."""
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.jobs:
                    self._start(self.waiting.pop(0))
                for job in [job for job in self.running if job.process.poll() is not None]:
                    self._ended(job)
                self.board.refresh({job.run.name: job.meter.read for job in self.running})
                time.sleep(POLL)
        finally:
            self._stop()

    def _start(self, run: Run) -> None:
        log = self.folder.path / f"{run.name}.log"
        try:
            with naming(log), log.open("ab") as file:
                start = file.tell()
                gap = "\n" if start else ""  # an earlier process of this run wrote here
                file.write(encoded(f"{gap}# {timestamp()}\n$ {run.command(self.folder.path)}\n"))
                file.flush()
                meter = Meter(self.folder.path / run.name, log, start)
                process = self._process(run, file)
        except PahqError as error:
            self.board.ended(self.folder.change(run.name, "failed", reason=str(error)))
            return
        self.running.append(Job(run, process, log, start, meter))
        self.board.started(self.folder.change(run.name, "running", started=timestamp()))

    def _process(self, run: Run, log: BinaryIO) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "NO_COLOR": "1"}
        return subprocess.Popen(
            [*JOB, *run.words(self.folder.path)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,  # a terminal's Ctrl-C comes here alone, and is handed on once
            pass_fds=(self.folder.lock,),
        )

    def _ended(self, job: Job) -> None:
        self.running.remove(job)
        _release(job.process)
        reason = _reason(job)
        facts = {"finished": timestamp()}
        if reason is None and (self.folder.path / job.run.name / RUN_FILE).exists():
            try:
                self.board.ended(self.folder.change(job.run.name, "done", **facts))
                return
            except PahqError as error:
                reason = str(error)
        self.board.ended(self.folder.change(job.run.name, "failed", reason=reason or "it left no run.json", **facts))

    def _stop(self) -> None:
        """Ends what still runs: politely, then not. Those runs go on when the sweep is started again."""
        if not self.running:
            return
        for job in self.running:
            with contextlib.suppress(ProcessLookupError):
                job.process.send_signal(signal.SIGINT)
        end = time.monotonic() + GRACE
        try:
            for job in self.running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    job.process.wait(max(0.0, end - time.monotonic()))
        finally:  # a second Ctrl-C is one too many to wait
            for job in self.running:
                job.process.kill()
                job.process.wait()
                _release(job.process)
            while self.running:
                name = self.running.pop().run.name
                done = (self.folder.path / name / RUN_FILE).exists()
                with contextlib.suppress(PahqError):  # a full disk, say, which is told by what led here
                    self.folder.change(name, "done" if done else "interrupted")


def _release(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def _reason(job: Job) -> str | None:
    """Why a process that has ended failed, None if it did not."""
    code = job.process.returncode
    if code == 0:
        return None
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = ", as the system does where memory runs out" if -code == signal.SIGKILL else ""
        return f"killed by {name}{hint}"
    try:
        with job.log.open("rb") as file:
            file.seek(job.start)
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except OSError as error:
        return f"ended with exit code {code}; {explain(error, job.log)}"
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if told:
        return told[-1]
    return lines[-1] if len(lines) > 2 else f"ended with exit code {code}"
