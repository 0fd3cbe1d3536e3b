"""Runs tracked offline that are killed, interrupted and bereft of W&B's own process; started by test_wandb.py.

Each run is a child of its own, forked before there is any thread. Prints what the runs said as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from pahq.api import execute
from pahq.report import machine
from pahq.report.config import RunConfig
from pahq.report.progress import Watch
from pahq.report.tracking import tracker
from pahq.report.tracking.settings import Tracking
from pahq.report.tracking.wandb_sink import HEADER_BYTES
from tiny import RandomTask, transformer

CONFIG = RunConfig("object:Transformer", "object:random", 1e-5, metric="kl_div", n=4)


class Acting(Watch):
    """Calls ``act`` once, after ``batches`` batches of decisions; keeps what is said in ``said``."""

    def __init__(self, act: Any, batches: int, said: Path) -> None:
        self.act, self.left, self.said = act, batches, said

    def say(self, text: str) -> None:
        with self.said.open("a") as file:
            file.write(text + "\n")

    def update(self, progress: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()


def kill_when_written(out: Path) -> None:
    """Kills the run once W&B has something of it on the disk, which takes it about a second."""
    until = time.monotonic() + 60
    while not any(file.stat().st_size > HEADER_BYTES for file in out.glob("wandb/*/run-*.wandb")):
        if time.monotonic() > until:
            raise TimeoutError("W&B wrote nothing")
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


def kill_wandb() -> None:
    """Kills the process that wandb has started beside this one."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (folder / "status").read_text()
            if f"PPid:\t{os.getpid()}\n" in status:
                os.kill(int(folder.name), signal.SIGKILL)


def run(out: Path, act: Any, batches: int, tracking: Tracking | None) -> int:
    """The exit code of a child that runs or resumes the run in ``out``."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        watch = Acting(act, batches, out.parent / f"{out.name}.said")
        execute(CONFIG, out, model=transformer(4, 4), task=RandomTask(), watch=watch, view=False, tracking=tracking)
    except KeyboardInterrupt:
        sys.exit(130)  # with the exit handlers, wandb's among them
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    machine.gemm_peak = lambda *_: 1e11  # half a second of every run otherwise
    tracker.INTERVAL = 0.0
    tracking = Tracking(mode="offline", project="p", tags=("a",))
    codes = {
        "untracked": [run(folder / "untracked", None, 0, None)],
        "resumed": [
            run(folder / "resumed", lambda: kill_when_written(folder / "resumed"), 35, tracking),
            run(folder / "resumed", interrupt, 4, None),  # as it began
            run(folder / "resumed", None, 0, None),
        ],
        "bereft": [run(folder / "bereft", kill_wandb, 3, tracking)],
    }
    said = {name: (folder / f"{name}.said").read_text().splitlines() for name in codes}
    print(json.dumps({"codes": codes, "said": said}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
