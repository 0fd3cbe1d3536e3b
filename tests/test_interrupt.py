"""Killed at any instant, a run goes on where it was and ends in the same circuit, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tiny import save_model, save_prompts

KILLS = [({"policy": "fp32", "threshold": 2e-5}, 20), ({"policy": "pahq", "threshold": 1e-3}, 5)]
"""Options (the threshold sets how long a run takes) and number of kills."""
SCORING = [
    ({"method": "double", "edges": 50, "method_options": {"pause": 0.01}}, 6),
    ({"method": "edge-pruning", "metric": "logit_diff", "method_options": {"steps": 60}}, 4),
    ({"method": "exact", "edges": 50, "size": (4, 4), "method_options": {"max_states": 8}}, 4),
]
HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def killed_runs(folder: Path, kills: int, options: dict[str, Any]) -> dict[str, Any]:
    """What ``killed_runs.py`` prints about runs with these options."""
    command = [sys.executable, str(HERE / "killed_runs.py"), str(folder), str(kills), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("options", "kills"), SCORING)
def test_scoring_runs_killed_at_random_moments_end_in_the_same_circuit(
    tmp_path: Path, options: dict[str, Any], kills: int
) -> None:
    found = killed_runs(tmp_path, kills, {"threshold": None, "size": (2, 2)} | options)
    moments = found["moments"]
    assert len(moments) >= kills
    assert len({moment["state"] for moment in moments} - {""}) >= kills // 4, moments
    assert all(circuit == found["whole"] for circuit in found["resumed"]), moments


@pytest.mark.parametrize(("options", "kills"), KILLS)
def test_runs_killed_at_random_moments_end_in_the_same_circuit(
    tmp_path: Path, options: dict[str, Any], kills: int
) -> None:
    found = killed_runs(tmp_path, kills, options)
    moments = found["moments"]
    assert len(moments) >= kills
    # Most kills must have hit a run in the middle of its search, at different places.
    assert sum(moment["decisions"] > 0 and not moment["finished"] for moment in moments) >= kills // 2, moments
    assert len({moment["decisions"] for moment in moments}) >= kills // 2, moments
    assert all(circuit == found["whole"] for circuit in found["resumed"]), moments


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_model(folder / "model", layers=7, heads=8)
    save_prompts(folder / "prompts.jsonl", 48)
    return folder


def command(files: Path, out: Path) -> list[str]:
    options = {"model": files / "model", "task": files / "prompts.jsonl", "threshold": 1e-5, "metric": "kl_div", "n": 8}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "pahq", "discover", *words, "--out", str(out), "--quiet"]


def stopped(files: Path, out: Path, how: signal.Signals, decisions: int) -> tuple[int, str]:
    """Starts a run, sends it a signal once its journal holds so many decisions: exit code and standard error."""
    with subprocess.Popen(command(files, out), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        journal, end = out / "journal.jsonl", time.monotonic() + 100
        while not (journal.exists() and journal.read_bytes().count(b'"order"') >= decisions):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(how)
        _, error = process.communicate(timeout=100)
    assert not (out / "run.json").exists()
    return process.returncode, error


def test_command_line_goes_on_after_a_kill_and_after_ctrl_c(files: Path, tmp_path: Path) -> None:
    subprocess.run(command(files, tmp_path / "whole"), check=True, env=ENVIRONMENT)
    circuit = (tmp_path / "whole" / "circuit.safetensors").read_bytes()

    code, _ = stopped(files, tmp_path / "killed", signal.SIGKILL, 300)
    assert code == -signal.SIGKILL
    subprocess.run(command(files, tmp_path / "killed"), check=True, env=ENVIRONMENT)  # the same command
    assert (tmp_path / "killed" / "circuit.safetensors").read_bytes() == circuit

    code, error = stopped(files, tmp_path / "asked", signal.SIGINT, 100)
    assert code == 130
    assert error == f"interrupted; go on with: pahq resume {tmp_path / 'asked'}\n"
    resume = [sys.executable, "-m", "pahq", "resume", str(tmp_path / "asked"), "--quiet"]
    done = subprocess.run(resume, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "asked" / "circuit.safetensors").read_bytes() == circuit
