"""benchmarks/precision.py from end to end on a tiny model: every row of its table, and one that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiny

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "precision.py"
FIGURES = {
    "agree_exact",
    "agree_plain_0.01",
    "agree_plain_0.001",
    "escalated_0.01",
    "escalated_0.001",
    *(f"auc_{row}{kind}" for row in ("fp32", "values", "plain", "rtn") for kind in ("", "_pessimistic")),
    "weight_ratio",
    "time_ratio",
    "pfe_mixed",
}


def benchmark(folder: Path, *options: str) -> tuple[dict, str]:
    tiny.save_model(folder / "model", layers=2, heads=2)
    tiny.save_prompts(folder / "prompts.jsonl")
    command = [sys.executable, str(SCRIPT), "--model", str(folder / "model"), "--tasks", str(folder / "prompts.jsonl")]
    command += ["--n", "4", "--sweep-n", "4", "--sample", "6", "--reference", "0.02", "--in-process"]
    command += ["--out", str(folder / "out.json"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text()), done.stdout


@pytest.mark.usefixtures("own_cache")
def test_every_row_and_figure(tmp_path: Path) -> None:
    found, screen = benchmark(tmp_path, "--repeats", "2", "--thresholds", "0.1,0.02,0.01")
    assert not found["details"]["failures"], screen
    assert set(found["figures"]) == FIGURES
    figures = found["figures"]
    assert figures["agree_exact"] == 1
    assert figures["agree_plain_0.01"] > 0.9
    assert figures["auc_plain"] > 0.9
    assert figures["auc_fp32_pessimistic"] == 1  # its sweep holds the reference circuit itself
    assert figures["auc_plain"] >= figures["auc_rtn"]
    (task,) = (name for name in found["details"] if name.endswith("prompts.jsonl"))
    details = found["details"][task]
    assert details["rows"]["fp32"]["f1"] == 1
    assert details["rows"]["fp32"]["weight_ratio"] == 1
    assert 0 <= details["fp32_noise"] < 1e-4
    assert details["rtn"]["zero_effects"] > 0.01
    assert 0 < details["rtn"]["lost_share"] < 1
    for row, facts in details["rows"].items():
        assert {"time", "f1", "peak", "weights"} <= set(facts), row
        assert row == "fp32" or "agree_0.02" in facts
    assert all(row in screen for row in details["rows"])


@pytest.mark.usefixtures("own_cache")
def test_failures_are_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    found, screen = benchmark(tmp_path, "--n", "5000", "--repeats", "1", "--thresholds", "0.1", "--auc", "pahq")
    failures = found["details"]["failures"]
    assert len(failures) == 9  # every timed sweep but rtn's and their reference, for want of prompts
    assert all(reason.startswith("failed: error: ") for reason in failures.values())
    assert "time_ratio" not in found["figures"]
    assert found["figures"]["agree_exact"] == 1
    assert "failed: error: " in screen


@pytest.mark.usefixtures("own_cache")
def test_when_time_is_over_nothing_new_is_started(tmp_path: Path) -> None:
    found, screen = benchmark(tmp_path, "--minutes", "0")
    assert not found["figures"]
    assert all(reason.startswith("left out") for reason in found["details"]["failures"].values())
    assert "left out: the task's 0 minutes are over" in screen


def test_a_worker_that_fails_says_so_in_one_line() -> None:
    job = {"kind": "sweep", "model": "no-such-model", "task": "ioi", "n": 2, "seed": 0}
    done = subprocess.run([sys.executable, str(SCRIPT), "--worker", json.dumps(job)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout
