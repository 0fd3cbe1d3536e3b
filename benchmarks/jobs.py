"""Jobs of benchmarks/precision.py in processes of their own: asked for once, told on screen, saved as they come."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.files import read_json, write_json
from sweeps import work

Answer = dict[str, Any]
SCRIPT = Path(__file__).with_name("precision.py")


class Runner:
    """Has jobs done in processes of their own and keeps their answers. A job that fails has no answer."""

    def __init__(self, given: argparse.Namespace, facts: dict[str, Any]) -> None:
        self.given, self.facts, self.start = given, facts, time.monotonic()
        self.answers: dict[str, Answer] = {}
        self.failures: dict[str, str] = {}
        if given.resume:
            self._take_up(given.out)

    def _take_up(self, out: Path | None) -> None:
        """The answers that a run which was cut short left in its file."""
        if out is None or not out.exists():
            return
        before = read_json(out)
        if before.get("commit") != self.facts["commit"]:
            print(f"note: {out} was begun at commit {before.get('commit')}, now it is {self.facts['commit']}")
        commit = {"commit": before.get("commit")}
        self.answers = {key: commit | answer for key, answer in before.get("answers", {}).items()}
        print(f"going on after {len(self.answers)} jobs in {out}")

    def start_task(self) -> None:
        """The time given for a task runs from here."""
        self.start = time.monotonic()

    def ask(self, task: str, kind: str, **job: Any) -> Answer | None:
        """The answer to a job, asked only once; None if it failed, or if the time for its task is over."""
        job = {"kind": kind, "model": self.given.model, "task": task, **job}
        key = json.dumps(job, sort_keys=True)
        if key in self.answers or key in self.failures:
            return self.answers.get(key)
        name = " ".join([kind, *(str(job[part]) for part in ("row", "threshold") if part in job)])
        what = f"  {task} {name}, {job['n']} prompts, seed {job['seed']}"
        if time.monotonic() - self.start > 60 * self.given.minutes:
            self.failures[key] = f"left out: the task's {self.given.minutes:g} minutes are over"
        else:
            self._run(key)
        if key in self.failures:
            print(f"{what}: {self.failures[key]}", flush=True)
            return None
        print(f"{what}: {_told(self.answers[key])}", flush=True)
        if self.given.out is not None:  # so that a run cut short leaves what it found
            write_json(self.given.out, {**self.facts, "unfinished": True, "answers": self.answers})
        return self.answers[key]

    def _run(self, key: str) -> None:
        if self.given.in_process:
            try:
                self.answers[key] = work(json.loads(key)) | {"process_s": 0.0, "commit": self.facts["commit"]}
            except PahqError as error:
                self.failures[key] = f"failed: error: {error}"
            return
        command = [sys.executable, str(SCRIPT), "--worker", key]
        began = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60 * self.given.patience)
        except subprocess.TimeoutExpired:
            self.failures[key] = f"failed: not done after {self.given.patience:g} minutes"
            return
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            reason = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            self.failures[key] = f"failed: {reason[-1]}"
            return
        known = {"process_s": time.monotonic() - began, "commit": self.facts["commit"]}
        self.answers[key] = json.loads(lines[-1]) | known


def _told(answer: Answer) -> str:
    """What a line on screen says about an answer."""
    if "seconds" not in answer:
        return f"{answer['process_s']:.0f} s"
    told = f"{answer['tests']} tests, {len(answer['kept'])} kept, {answer['seconds']:.1f} s"
    precision, check = answer["precision"], answer["check"]
    if precision["refined"]:
        told += f", {precision['refined_share']:.2%} escalated"
    if check is not None:
        told += f", {check['disagreements']} of {check['checked']} decisions differ, {check['within_noise']} in noise"
    return told
