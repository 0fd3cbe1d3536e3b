"""An evaluation that was killed goes on with the passes it had finished, and gives the same figures to the bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import commands
from commands import Pahq
from pahq.evaluation.examples import Examples
from pahq.files import naming, write_json
from pahq.report import machine, results
from pahq.report.passes import PassesFile
from tiny import save_model

FEW = ["--bootstrap", 20, "--knockouts", 4, "--removals", 6, "--random-circuits", 3, "--n", 6]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts, and runs of two thresholds."""
    return commands.two_runs(tmp_path_factory.mktemp("runs"))


def figures(folder: Path) -> dict[str, Any]:
    """Every file of an evaluation; of its record what is not about when and how it was made."""
    found: dict[str, Any] = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    for name in [name for name in found if name.endswith(".json")]:
        record = json.loads(found[name])
        for about in ("command", "started", "finished", "total_seconds"):
            record.pop(about)
        found[name] = record
    return found


def stop_after(passes: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ctrl-C once so many passes are run; -> a list that grows by one with each pass run."""
    plain, run = Examples._logits, list[int]()

    def counted(self: Examples, mask: np.ndarray) -> Any:
        if len(run) == passes:
            raise KeyboardInterrupt
        run.append(1)
        return plain(self, mask)

    monkeypatch.setattr(Examples, "_logits", counted)
    return run


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_an_interrupted_evaluation_goes_on(
    pahq: Pahq, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    few = FEW if command == "evaluate" else ["--bootstrap", 20, "--n", 6]
    words = [command, files / "tight", files / "loose", *few, "-q", "--out"]
    whole = stop_after(1000, monkeypatch)
    assert pahq(*words, tmp_path / "whole").code == 0
    monkeypatch.undo()

    for passes in {1, len(whole) - 1}:
        out = tmp_path / f"after{passes}"
        with pytest.MonkeyPatch.context() as patch:
            stop_after(passes, patch)
            answer = pahq(*words, out)
        assert (answer.code, answer.out) == (130, "")
        assert answer.err == f"interrupted; the same command goes on with what is in {out}\n"
        kind = {"evaluate": "evaluation", "compare": "comparison"}[command]
        assert [entry.name for entry in out.iterdir()] == [f"{kind}.passes.jsonl"]

        with pytest.MonkeyPatch.context() as patch:
            rest = stop_after(1000, patch)
            answer = pahq(*(word for word in words if word != "-q"), out)
        assert answer.code == 0, answer.err
        assert "passes of an interrupted evaluation …" in answer.err
        assert 0 < len(rest) <= len(whole) - passes
        assert figures(out) == figures(tmp_path / "whole")


def test_a_killed_process_goes_on(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    """kill -9, in a process of its own; the line that it was writing is torn."""

    words = ["evaluate", files / "tight", "--bootstrap", 20, "--knockouts", 150, "--n", 6, "-q", "--out"]
    out, end = tmp_path / "killed", time.monotonic() + 200
    with subprocess.Popen([sys.executable, "-m", "pahq", *map(str, [*words, out])], env=ENVIRONMENT) as process:
        passes = out / "evaluation.passes.jsonl"
        while not (passes.exists() and passes.read_bytes().count(b"\n") >= 5):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert [entry.name for entry in out.iterdir()] == [passes.name]
    passes.write_bytes(passes.read_bytes()[:-7])
    with pytest.MonkeyPatch.context() as patch:
        run = stop_after(1000, patch)
        assert pahq(*words, out).code == 0
        begun = len(run)
        assert pahq(*words, tmp_path / "whole").code == 0
        assert begun <= len(run) - begun - 4
    assert figures(out) == figures(tmp_path / "whole")


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, "")], ids=["stopped", "disk full"])
def test_what_is_measured_but_not_written_is_kept(
    pahq: Pahq, files: Path, tmp_path: Path, fault: BaseException
) -> None:
    """The last file, the record, is missing: tables and plots lie there without it."""
    words, out = ["evaluate", files / "tight", *FEW, "-q", "--out"], tmp_path / "out"

    def refuse(path: Path, _: object) -> None:
        with naming(path):
            raise fault

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "write_json", refuse)
        assert pahq(*words, out).code == (130 if isinstance(fault, KeyboardInterrupt) else 2)
    assert {"evaluation.csv", "evaluation.passes.jsonl"} <= {entry.name for entry in out.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        run = stop_after(1000, patch)
        assert (pahq(*words, out).code, run) == (0, [])
    assert pahq(*words, tmp_path / "whole").code == 0
    assert figures(out) == figures(tmp_path / "whole")


def test_nothing_stale_is_taken_up(pahq: Pahq, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other prompts, another metric, other weights, another version: each is measured anew."""
    runs = tmp_path / "runs"
    shutil.copytree(files, runs)
    for folder in ("tight", "loose"):  # weights are told by their values alone, so the runs must not know theirs
        record = json.loads((runs / folder / "run.json").read_text())
        record["config"] |= {"model": str(runs / "model"), "task": str(runs / "prompts.jsonl")}
        del record["identity"]
        write_json(runs / folder / "run.json", record)

    def passes(*more: object) -> int:
        """Passes run, of a command that goes on with what the first one left."""
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "begun", out)
        with pytest.MonkeyPatch.context() as patch:
            run = stop_after(1000, patch)
            answer = pahq("evaluate", runs / "tight", *FEW, *more, "-q", "--out", out)
            assert answer.code == 0, answer.err
        return len(run)

    (tmp_path / "begun").mkdir()
    whole = passes()
    (tmp_path / "begun").rmdir()
    with pytest.MonkeyPatch.context() as patch:
        stop_after(whole - 1, patch)
        assert pahq("evaluate", runs / "tight", *FEW, "-q", "--out", tmp_path / "begun").code == 130
    assert passes() == 1  # the last one
    assert passes("--n", 5) >= whole - 1
    assert passes("--metric", "kl_div") >= whole - 1
    with monkeypatch.context() as patch:
        patch.setattr(machine, "versions", lambda: {"pahq": "another"})
        assert passes() == whole
    save_model(runs / "model", layers=2, heads=2, seed=1)
    assert passes() >= whole - 1


def test_damaged_lines_do_not_count(tmp_path: Path) -> None:
    path, mask = tmp_path / "evaluation.passes.jsonl", np.eye(3, dtype=bool)
    sums = {"metric": np.array([1 / 3, -0.1]), "kl": np.array([5e-324, 1e300])}
    file = PassesFile(path)
    file.of({"a": 1}, 2).save(mask, sums)
    file.close()
    good = path.read_bytes()
    for damage in (b"", b"\x00" * 9, b"[]\n", b"{}\n", b'{"on": 1, "pass": 2, "sums": {"kl": ["x"]}}\n', good[:-9]):
        path.write_bytes(damage + b"\n" + good + damage)
        file = PassesFile(path)
        again = file.of({"a": 1}, 2)
        assert again.load(mask) == {name: values.tolist() for name, values in sums.items()}, damage
        assert again.load(~mask) == {}
        again.save(~mask, sums)  # after a torn line, too
        file.close()
        assert PassesFile(path).of({"a": 1}, 2).load(~mask) != {}
    path.write_bytes(good.replace(b"1e+300", b"NaN"))
    assert len(PassesFile(path).of({"a": 1}, 2)) == 0
    path.write_bytes(good)
    assert len(PassesFile(path).of({"a": 2}, 2)) == 0
    assert len(PassesFile(path).of({"a": 1}, 3)) == 0
