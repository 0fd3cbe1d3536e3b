"""benchmarks/truth.py and benchmarks/curves.py from end to end, as small as they get."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pahq.reproduction.auc import ROWS
from tiny import save_model, save_prompts

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def benchmark(script: str, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_every_method_has_an_area(tmp_path: Path) -> None:
    done = benchmark("truth.py", "--quick", "--truths", "trained-sum,ioi-gpt3", "--steps", 5, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out").read_text())
    figures = found["figures"]
    names = {f"{what}_{row.replace('-', '_')}" for row in ROWS for what in ("auc", "seconds")}
    assert set(figures) == names | {"same_pahq"}
    assert figures["same_pahq"] == 1
    assert figures["auc_acdc"] == figures["auc_pahq"] >= 0.98
    assert figures["auc_exact"] > figures["auc_random"]
    assert "auc_acdc: 1.0000, target >= 0.98: met" in done.stdout
    assert "left out: ioi-gpt3: truth 'ioi-gpt3' is unknown" in done.stdout
    assert not found["details"]["failures"]
    why = found["details"]["reasons"]
    examined = {"hisp", "subnetwork-probing", "eap", "information-flow"}
    assert set(why["reasons"]) == {row["method"] for row in why["table"]} == examined
    assert 0 < why["lost_additions"]["trained-sum"] < 0.5
    assert "hisp: its nature" in done.stdout
    assert {row["method"] for row in found["details"]["table"]} == set(ROWS)
    assert {"commit", "machine", "command"} <= set(found)


@pytest.mark.usefixtures("own_cache")
def test_curves_in_pieces(tmp_path: Path) -> None:
    save_model(tmp_path / "model", layers=2, heads=2)
    save_prompts(tmp_path / "prompts.jsonl")
    words = ["--model", tmp_path / "model", "--tasks", tmp_path / "prompts.jsonl", "--n", 4, "--one-process"]
    words += ["--sizes", "10,30", "--thresholds", "0.001", "--runs", tmp_path / "runs", "--methods", "acdc,eap"]
    words += ["--plot", tmp_path / "plot.png"]
    stopped = benchmark("curves.py", *words, "--minutes", 0)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count("left out: the 0 minutes are over") == 2
    done = benchmark("curves.py", *words, "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    points = found["details"]["points"]
    assert [point["asked"] for point in points] == ["threshold 0.001", "10 edges", "30 edges"]
    names = {f"faithfulness_prompts_{p['method']}_{p['size']}": p["recovered"] for p in points}
    spent = {f"{what}_prompts_{method}" for what in ("seconds", "mib") for method in ("acdc", "eap")}
    assert found["figures"].keys() == names.keys() | spent
    assert names.items() <= found["figures"].items()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    refused = benchmark("curves.py", *words)
    assert refused.returncode == 2
    assert "say --resume to go on with them" in refused.stderr
    again = benchmark("curves.py", *words, "--resume", "--out", tmp_path / "again.json")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again.json").read_text())["figures"] == found["figures"]
    assert "recovered\n  prompts" not in again.stdout  # nothing was measured anew
