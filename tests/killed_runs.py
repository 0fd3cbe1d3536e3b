"""Runs that are killed at random moments; started by test_interrupt.py as a process of its own.

It forks a child for every run, so that torch is imported once. It must be single-threaded before
the first product: a thread pool does not survive a fork. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import scored_runs
from pahq.api import execute
from pahq.evaluation.circuit import TENSOR_FILE
from pahq.report import machine, state
from pahq.report.config import RunConfig
from pahq.report.journal import JOURNAL_FILE
from pahq.report.state import STATE_FILE
from tiny import RandomTask, transformer

CONFIG = RunConfig("object:Transformer", "object:random", 0.0, metric="kl_div", n=4)


def start(out: Path, model: Any, task: Any, config: RunConfig) -> int:
    """The process id of a child that runs (or resumes) the run in ``out``."""
    child = os.fork()
    if child:
        return child
    try:
        execute(config, out, model=model, task=task)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def finish(out: Path, model: Any, task: Any, config: RunConfig) -> None:
    """Runs to the end; raises RuntimeError if the child failed."""
    code = os.waitstatus_to_exitcode(os.waitpid(start(out, model, task, config), 0)[1])
    if code:
        raise RuntimeError(f"a run in {out} ended with exit code {code}")


def kill_after(seconds: float, out: Path, model: Any, task: Any, config: RunConfig) -> dict[str, Any]:
    """Starts or resumes the run in ``out``, kills it after ``seconds``, and says how far it had come."""
    child = start(out, model, task, config)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    journal = out / JOURNAL_FILE
    return {
        "killed": status == -signal.SIGKILL,
        "decisions": journal.read_bytes().count(b'"order"') if journal.exists() else 0,
        "state": (out / STATE_FILE).read_bytes().hex()[:4000] if (out / STATE_FILE).exists() else "",
        "finished": (out / "run.json").exists(),
    }


def main(folder: Path, kills: int, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    machine.gemm_peak = lambda *_: 1e11  # half a second of every run otherwise
    scored_runs.add_double()
    if options.get("method") == "edge-pruning":  # the first optimiser imports for seconds, here instead of in children
        torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    state.SHARE = float("inf")  # every state is written
    layers, heads = options.pop("size", (5, 6))
    given = transformer(layers, heads), RandomTask(), replace(CONFIG, **options)
    seconds = []
    for name in ("whole", "again"):  # the first run of a process is slower
        began = time.monotonic()
        finish(folder / name, *given)
        seconds.append(time.monotonic() - began)
    draw = random.Random(0)
    moments: list[dict[str, Any]] = []
    resumed: list[str] = []
    while len(moments) < kills and len(resumed) < 3 * kills:
        out = folder / f"run{len(resumed)}"
        for _ in range(1 + len(resumed) % 2):  # every other run is killed twice before it may end
            moment = {"run": out.name, **kill_after(draw.uniform(0, min(seconds)), out, *given)}
            if moment["killed"]:  # else it had ended before
                moments.append(moment)
        finish(out, *given)
        resumed.append((out / TENSOR_FILE).read_bytes().hex())
    whole = (folder / "whole" / TENSOR_FILE).read_bytes().hex()
    print(json.dumps({"whole": whole, "resumed": resumed, "moments": moments}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
