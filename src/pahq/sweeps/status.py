"""What is known of a sweep's runs, and the folder in which it is kept.

``sweep.json``, ``sweep.csv`` and ``index.html`` are written anew, each at once, whenever a run begins or ends. That a
run is done is told by its own folder, so that a sweep which was killed finds it again; that one failed, and why, is
told by ``sweep.json`` alone.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.evaluation.circuit import JSON_FILE
from pahq.evaluation.faithfulness import recovered
from pahq.files import naming, read_json, write_atomic, write_json
from pahq.inputs import timestamp
from pahq.precision.policy import get_policy
from pahq.report.folder import LOCK_FILE, RUN_FILE, START_FILE, RunFolder
from pahq.report.tables import Row, as_csv, as_json
from pahq.sweeps.page import page
from pahq.sweeps.runs import Run
from pahq.viewing import VIEWER_FILE

FORMAT = "pahq-sweep-1"
SWEEP_FILE, CSV_FILE, PAGE_FILE = "sweep.json", "sweep.csv", "index.html"
JOBS_LOCK = ".jobs.lock"
"""Held by the sweep and by every process of it: free once the last of them has ended."""
KEYS = (
    "run",
    "task",
    "model",
    "method",
    "policy",
    "threshold",
    "edges_asked",
    "metric",
    "state",
    "reason",
    "edges",
    "edges_total",
    "metric_circuit",
    "recovered",
    "accuracy",
    "accuracy_model",
    "metric_circuit_test",
    "recovered_test",
    "accuracy_test",
    "accuracy_model_test",
    "total_seconds",
    "host_bytes",
    "device_bytes",
    "log",
    "viewer",
    "started",
    "finished",
    "command",
)
"""What a row tells of a run, None where it is not known or not so."""
STATES = ("waiting", "interrupted", "running", "done", "failed")
PATIENCE = 60.0
"""Seconds given to the processes of a killed sweep to end."""


class SweepFolder:
    """rows: run's name -> what is known of it, with the keys of ``row_of``; ``lock``: a descriptor that jobs inherit.

    Raises PahqError where the folder cannot be made or written, holds anything else, or is another sweep's at work.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.facts = path, dict[str, Row](), dict[str, Any]()
        with naming(path):
            path.mkdir(parents=True, exist_ok=True)
            found = sorted(entry.name for entry in path.iterdir())
        strangers = [name for name in found if name not in (LOCK_FILE, JOBS_LOCK) and not name.endswith(".tmp")]
        if strangers and SWEEP_FILE not in found:
            raise PahqError(f"{path}: holds something else ('{strangers[0]}'); choose a new or empty folder")
        self._locks: list[int] = []
        try:
            self._take(LOCK_FILE, 0.0, "another sweep is at work here; wait for it, or choose another folder")
            stuck = "processes of a sweep that was killed still run here; wait until they have ended"
            self.lock = self._take(JOBS_LOCK, PATIENCE, stuck)
            self.before = recorded(path) or {}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

    def __enter__(self) -> SweepFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, runs: Sequence[Run], facts: dict[str, Any], retry_failed: bool) -> None:
        """Takes up the runs and what is known of them; those of earlier grids in this folder stay in its tables.

        Raises PahqError for a run's folder that holds another run.
        """
        self.facts = {"started": timestamp(), **facts}
        if "started" in self.before:
            self.facts["started"] = self.before["started"]
        told = {row["run"]: row for row in self.before.get("runs", [])}
        self.rows = {run.name: state_of(run, self.path, told.get(run.name), retry_failed) for run in runs}
        for name, row in told.items():
            if name not in self.rows and row.get("state") in ("done", "failed"):
                self.rows[name] = {key: row.get(key) for key in KEYS}
        self.write()

    def change(self, name: str, state: str, **facts: Any) -> Row:
        """The run's row in its new state, which is on the disk by then."""
        self.rows[name] |= {"state": state, "reason": None, **facts}
        if state == "done":
            self.rows[name] |= figures_of(self.path / name)
        self.write()
        return self.rows[name]

    def record(self, finished: bool = False) -> dict[str, Any]:
        rows = list(self.rows.values())
        counts = counted(rows)
        ended = timestamp() if finished else None
        return {"format": FORMAT, **self.facts, "finished": ended, "counts": counts, "runs": rows}

    def write(self, finished: bool = False) -> dict[str, Any]:
        """Writes page, table and record, the last of which is returned."""
        record = as_json(self.record(finished))
        write_json(self.path / SWEEP_FILE, record)
        write_atomic(self.path / CSV_FILE, as_csv(record["runs"]))
        write_atomic(self.path / PAGE_FILE, page(record, timestamp()))
        return record

    def _take(self, name: str, patience: float, problem: str) -> int:
        with naming(self.path / name):
            lock = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._locks.append(lock)
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise PahqError(f"{self.path}: {problem}") from None
                time.sleep(0.05)
            except OSError:  # some network file systems have no locks: go on without, as a run does
                return lock


def recorded(path: Path) -> dict[str, Any] | None:
    """The record of the sweep in a folder, None where there is none. Raises PahqError for a damaged one."""
    if not (path / SWEEP_FILE).exists():
        return None
    record = read_json(path / SWEEP_FILE)
    rows = record.get("runs")
    sound = isinstance(rows, list) and all(isinstance(row, dict) and isinstance(row.get("run"), str) for row in rows)
    if record.get("format") != FORMAT or not sound:
        raise PahqError(f"{path / SWEEP_FILE}: the file is damaged or of another version of pahq; remove it")
    return record


def state_of(run: Run, out: Path, told: Row | None, retry_failed: bool, hold: bool = True) -> Row:
    """A run's row as its folder, and what was told of it before (None: nothing), have it.

    hold: False to look on while a sweep may be at work. Raises PahqError for a folder that holds another run, and with
    ``hold`` for one that a process is writing.
    """
    row = row_of(run, out)
    folder = out / run.name
    if folder.exists():
        with RunFolder(folder, hold=hold) as there:
            there.check(run.config)
            there.check_policy(run.config.policy, get_policy(run.config.policy, run.config.under_test).to_dict())
            if there.finished:
                return row | {"state": "done"} | figures_of(folder)
    if told is not None and told.get("state") == "failed" and _same(told, row) and not retry_failed:
        return row | {name: told.get(name) for name in ("state", "reason", "started", "finished")}
    if not hold and told is not None and told.get("state") == "running":
        return row | {"state": "running", "started": told.get("started")}
    return row | {"state": "interrupted" if (folder / START_FILE).exists() else "waiting"}


def _same(told: Row, row: Row) -> bool:
    """Whether two rows are about a run of the same options, wherever it lies."""
    return str(told.get("command")).rpartition(" --out ")[0] == row["command"].rpartition(" --out ")[0]


def row_of(run: Run, out: Path) -> Row:
    """A run of which nothing is known yet."""
    c = run.config
    return dict.fromkeys(KEYS) | {
        "run": run.name,
        "task": run.task,
        "model": run.model,
        "method": c.method,
        "policy": run.policy,
        "threshold": c.threshold,
        "edges_asked": c.edges,
        "metric": c.metric,
        "state": "waiting",
        "log": f"{run.name}.log",
        "command": run.command(out),
    }


def figures_of(folder: Path) -> Row:
    """A finished run's figures; ``…_test``: on held-out prompts, None where there are none.

    recovered: (m(circuit) - m(corrupted prompts)) / (m(model) - m(corrupted prompts)). Raises PahqError for damage.
    """
    circuit, record = read_json(folder / JSON_FILE), read_json(folder / RUN_FILE)
    try:
        size, peak = circuit["size"], record["peak_memory"]
        found: Row = {
            "edges": size["addition"] + size["direct"],
            "edges_total": size["addition_total"] + size["direct_total"],
            "total_seconds": record["total_seconds"],
            "host_bytes": peak["host_bytes"],
            "device_bytes": peak.get("device_bytes"),
            "viewer": f"{folder.name}/{VIEWER_FILE}" if (folder / VIEWER_FILE).exists() else None,
            "started": record["started"],
            "finished": record["finished"],
        }
        for split, ending in (("validation", ""), ("test", "_test")):
            figures = circuit["figures"].get(split, {})
            if "missing" in figures:
                continue
            metric = {who: figures[who]["metric"] for who in ("circuit", "corrupted", "full")}
            found |= {
                f"metric_circuit{ending}": metric["circuit"],
                f"recovered{ending}": recovered(metric["circuit"], metric["corrupted"], metric["full"]),
                f"accuracy{ending}": figures["circuit"]["accuracy"],
                f"accuracy_model{ending}": figures["full"]["accuracy"],
            }
        return found
    except (KeyError, TypeError, AttributeError) as error:
        raise PahqError(f"{folder}: {error} is missing or damaged in the run's records; remove the folder") from error


def counted(rows: Iterable[Row]) -> dict[str, int]:
    """state -> number of runs, for all states."""
    found = Counter(row["state"] for row in rows)
    return {state: found[state] for state in STATES}
