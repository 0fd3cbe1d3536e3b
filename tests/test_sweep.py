"""``pahq sweep`` at work: in processes side by side, past failures, after kills, again and again in one folder."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import commands
import pahq as package
from commands import Pahq
from pahq.api import discover
from pahq.errors import PahqError
from pahq.report.progress import Watch
from pahq.sweeps import runner, status
from pahq.sweeps.board import LiveBoard
from pahq.sweeps.progress import Meter
from pahq.sweeps.status import JOBS_LOCK, SweepFolder
from pahq.sweeps.sweep import plan, preview, run_sweep
from tiny import save_model, save_prompts

HERE = Path(__file__).parent
FAKE = (sys.executable, str(HERE / "fake_jobs.py"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = commands.small_files(tmp_path_factory.mktemp("files"))
    save_model(folder / "large", layers=6, heads=8)
    return folder


@pytest.fixture(scope="module")
def finished(files: Path) -> Path:
    """The folder of a finished run of the tiny model at threshold 0.1."""
    out = files / "finished"
    discover(str(files / "model"), str(files / "prompts.jsonl"), 0.1, metric="kl_div", n=4, out=out)
    return out


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, finished: Path, tmp_path: Path) -> Path:
    """Processes are those of ``fake_jobs``; they leave a file each in the folder."""
    (tmp_path / "began").mkdir()
    (tmp_path / "began" / "run").symlink_to(finished)
    monkeypatch.setattr(runner, "JOB", FAKE)
    monkeypatch.setenv("FAKE_RUN", str(tmp_path / "began" / "run"))
    return tmp_path / "began"


def grid(files: Path, *thresholds: float, **more: Any) -> dict[str, Any]:
    given = {"tasks": str(files / "prompts.jsonl"), "models": str(files / "model"), "metrics": "kl_div"}
    return {**given, "thresholds": list(thresholds), "options": {"n": 4}, **more}


def states(record: dict[str, Any]) -> dict[str, str]:
    return {row["run"]: row["state"] for row in record["runs"]}


class Said(Watch):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def until(done: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + 300
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.mark.usefixtures("own_cache")
def test_two_jobs_and_a_failing_run(pahq: Pahq, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, with real processes: files and names, exit code, what is said and where."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (files / "broken").mkdir()
    (files / "broken" / "config.json").write_text("{}")
    words = ("sweep", "--tasks", files / "prompts.jsonl", "--models", f"{files / 'model'},{files / 'broken'}")
    words = (*words, "--thresholds", "0.01", "--metrics", "kl_div", "--n", 4, "--jobs", 2, "--out", tmp_path / "out")
    answer = pahq(*words)
    assert answer.code == 3, answer.err
    good, bad = "prompts_model_0.01_kl_div", "prompts_broken_0.01_kl_div"
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert states(record) == {good: "done", bad: "failed"}
    assert record["counts"] == {"waiting": 0, "interrupted": 0, "running": 0, "done": 1, "failed": 1}
    names = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert names == {good, f"{good}.log", bad, f"{bad}.log", "sweep.json", "sweep.csv", "index.html"}
    lines = answer.err.splitlines()
    assert lines[0].startswith("2 runs: 2 to do; 2 at a time, 1 thread each")
    assert lines[1:3] == [f"started {good}", f"started {bad}"]
    assert any(line.startswith(f"done {good}: ") for line in lines)
    assert any(line.startswith(f"failed {bad}: ") and "broken" in line for line in lines)
    assert "1 done, 1 failed" in answer.out
    assert answer.out.splitlines()[-1] == f"written: {tmp_path / 'out' / 'index.html'}"
    row, lost = record["runs"]
    assert f"failed: {bad}: {lost['reason']}" in answer.out
    log = (tmp_path / "out" / f"{good}.log").read_text()
    assert f"$ {row['command']}\n" in log
    assert "kept " in log
    facts = json.loads((tmp_path / "out" / good / "run.json").read_text())
    assert facts["command"] == row["command"]
    assert facts["machine"]["threads"] == record["threads"] == 1
    circuit = json.loads((tmp_path / "out" / good / "circuit.json").read_text())
    assert row["edges"] == len(circuit["edges"])
    test = circuit["figures"]["test"]
    gap = test["full"]["metric"] - test["corrupted"]["metric"]
    assert row["recovered_test"] == pytest.approx((test["circuit"]["metric"] - test["corrupted"]["metric"]) / gap)
    assert (tmp_path / "out" / row["viewer"]).exists()
    table = list(csv.DictReader((tmp_path / "out" / "sweep.csv").read_text().splitlines()))
    assert [line["reason"] for line in table] == ["", lost["reason"]]
    assert int(table[0]["edges"]) == row["edges"]
    again = pahq(*words, "--json")
    assert again.code == 3
    assert json.loads(again.out)["runs"] == record["runs"]
    assert again.err.splitlines() == [
        "2 runs: 1 done before, 1 failed before (--retry-failed runs them again), 0 to do; 2 at a time, 1 thread each; "
        f"see {tmp_path / 'out' / 'index.html'}"
    ]


def start_here(files: Path, out: Path) -> int:
    """The id of a process forked from this one that sweeps."""
    child = os.fork()
    if child:
        return child
    try:
        made = plan(grid(files, 1e-5, models=str(files / "large")), out)
        run_sweep(made, 1, False, Watch(), "x")
    finally:
        os._exit(0)


@pytest.mark.filterwarnings(
    "ignore:os.fork:RuntimeWarning"
)  # JAX's, if other tests brought it; the child has no use for it
@pytest.mark.usefixtures("own_cache")
def test_killed_it_leaves_no_process_and_goes_on_to_the_same_circuit(files: Path, tmp_path: Path) -> None:
    out, name = tmp_path / "out", "prompts_large_1e-05_kl_div"
    journal = out / name / "journal.jsonl"
    parent = start_here(files, out)
    until(lambda: journal.exists() and journal.read_bytes().count(b'"order"') >= 100, "no decisions")
    (row,) = preview(plan(grid(files, 1e-5, models=str(files / "large")), out))
    assert row["state"] == "running"  # told while its process holds the folder
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert states(json.loads((out / "sweep.json").read_text())) == {name: "running"}
    assert not (out / name / "run.json").exists()
    record = package.sweep(grid(files, 1e-5, models=str(files / "large")), out)
    assert set(states(record).values()) == {"done"}
    facts = json.loads((out / name / "run.json").read_text())
    assert facts["search"]["resumes"] == 1
    assert (out / f"{name}.log").read_text().count("$ pahq discover") == 2
    assert "going on after" in (out / f"{name}.log").read_text()
    whole = discover(
        str(files / "large"), str(files / "prompts.jsonl"), 1e-5, metric="kl_div", n=4, out=tmp_path / "whole"
    )
    assert whole.n_edges == record["runs"][0]["edges"]
    files_of = [folder / "circuit.safetensors" for folder in (out / name, tmp_path / "whole")]
    assert files_of[0].read_bytes() == files_of[1].read_bytes()


def test_failures_are_told_and_tried_again_only_when_asked(
    files: Path, fakes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, out = Said(), tmp_path / "out"
    made = plan(grid(files, 0.2, 0.3, 0.4, 0.6, 0.1), out)
    record = run_sweep(made, 1, False, said, "x")
    reasons = [row["reason"] for row in record["runs"]]
    assert reasons == [
        "prompts: there is <b>none</b>; give some",
        "killed by SIGKILL, as the system does where memory runs out",
        "TypeError: a bug",
        "it left no run.json",
        None,
    ]
    assert said.lines[-1].startswith("done prompts_model_0.1_kl_div: ")
    assert "(5 of 5)" in said.lines[-1]
    page = (out / "index.html").read_text()
    assert "&lt;b&gt;none&lt;/b&gt;" in page
    assert "<b>" not in page
    assert len(list(fakes.glob("*.began"))) == 5
    for retry, tried in ((False, 5), (True, 9)):
        again = run_sweep(made, 2, retry, said, "x")
        assert [row["reason"] for row in again["runs"]] == reasons
        assert len(list(fakes.glob("*.began"))) == tried
    assert [row["state"] for row in preview(made, True)] == ["waiting"] * 4 + ["done"]
    monkeypatch.chdir(tmp_path)  # the same folder by another path
    assert [row["state"] for row in preview(replace(made, out=Path("out")))] == ["failed"] * 4 + ["done"]


def test_jobs_run_at_the_same_time_and_share_the_cores(
    files: Path, fakes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fakes / "together").write_text("0.3")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    alone = run_sweep(plan(grid(files, 0.1), tmp_path / "alone"), 1, False, Watch(), "x")
    assert [row["reason"] for row in alone["runs"]] == ["alone"]
    (started,) = fakes.glob("*.began")
    assert started.read_text() == "6"
    started.unlink()
    (fakes / "together").write_text("60")
    two = grid(files, 0.1, models={"a": str(files / "model"), "b": str(files / "model")})
    record = run_sweep(plan(two, tmp_path / "two"), 2, False, Watch(), "x")
    assert states(record) == {"prompts_a_0.1_kl_div": "done", "prompts_b_0.1_kl_div": "done"}
    assert [file.read_text() for file in fakes.glob("*.began")] == ["3", "3"]


def test_ctrl_c_ends_the_runs_and_the_same_command_goes_on(
    files: Path, fakes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pahq: Pahq
) -> None:
    def interrupted(seconds: float) -> None:
        if list(fakes.glob("*.began")):
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.time, "sleep", interrupted)
    file = tmp_path / "grid.yaml"
    file.write_text(json.dumps(grid(files, 0.5, 0.1)))
    answer = pahq("sweep", file, "--out", tmp_path / "out")
    assert answer.code == 130
    assert answer.err.splitlines()[-1] == f"interrupted; the same command goes on with the runs in {tmp_path / 'out'}"
    (began,) = fakes.glob("*.began")
    with pytest.raises(ProcessLookupError):
        os.kill(int(began.stem.rpartition("-")[2]), 0)
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["state"] for row in record["runs"]] == ["interrupted", "waiting"]
    assert record["finished"] is None


def test_a_grid_may_grow_and_other_options_are_refused(files: Path, fakes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_sweep(plan(grid(files, 0.1, 0.2), out), 1, False, Watch(), "x")
    record = run_sweep(plan(grid(files, 0.3), out), 1, False, Watch(), "x")
    assert states(record) == {
        "prompts_model_0.3_kl_div": "failed",
        "prompts_model_0.1_kl_div": "done",
        "prompts_model_0.2_kl_div": "failed",
    }
    count = len(list(fakes.glob("*.began")))
    other = plan(grid(files, 0.1, 0.4, options={"n": 5}), out)
    for act in (lambda: run_sweep(other, 1, False, Watch(), "x"), lambda: preview(other)):
        with pytest.raises(PahqError, match=r"0.1_kl_div: holds another run \(n is 4 there, 5 here\)"):
            act()
    assert len(list(fakes.glob("*.began"))) == count
    assert states(json.loads((out / "sweep.json").read_text())) == states(record)


def test_folders_that_cannot_be_used(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(grid(files, 0.1), tmp_path / "odd")
    with pytest.raises(PahqError, match="jobs: 0 is no number of processes"):
        run_sweep(made, 0, False, Watch(), "x")
    assert not (tmp_path / "odd").exists()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "notes.txt").touch()
    with pytest.raises(PahqError, match="holds something else"):
        run_sweep(made, 1, False, Watch(), "x")
    with (
        SweepFolder(tmp_path / "mine"),
        pytest.raises(PahqError, match="another sweep is at work here"),
    ):
        SweepFolder(tmp_path / "mine")
    with (tmp_path / "mine" / JOBS_LOCK).open() as held:  # as a process of a killed sweep does
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(status, "PATIENCE", 0.1)
        with pytest.raises(PahqError, match="processes of a sweep that was killed still run here"):
            SweepFolder(tmp_path / "mine")
    (tmp_path / "mine" / "sweep.json").write_text('{"format": "pahq-sweep-1", "runs": [3]}')
    with pytest.raises(PahqError, match="damaged or of another version"):
        SweepFolder(tmp_path / "mine")


def test_what_is_in_the_way_is_seen_before_anything_is_run(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    for words, message in (
        ((), "sweep: no grid is given"),
        (("papre",), "grid 'papre': is neither"),
        (("paper", "--only", "tracr*"), "only: 'tracr*' matches none of the 96 runs"),
        (("--tasks", "ioi", "--thresholds", "0.1"), "flags: models: is missing"),
        (("demo", "--option", "nn=3"), "options: 'nn' is unknown"),
        (("demo", "--option", "n"), "'n' is not NAME=VALUE"),
        (("demo", "--jobs", "0"), "jobs: 0 is no number"),
    ):
        assert message in pahq("sweep", *words, "--out", tmp_path / "out").error
    assert not (tmp_path / "out").exists()


def test_lists_and_dry_runs(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    listed = pahq("sweep", "--list")
    assert listed.out.splitlines()[2].startswith("paper: The grid of Wang et al. 2025")
    assert [one["grid"] for one in json.loads(pahq("sweep", "--list", "--json").out)["grids"]] == [
        "acdc",
        "demo",
        "paper",
    ]
    words = ("sweep", "--dry-run", "--tasks", "ioi", "--models", "gpt2", "--thresholds", "0.5,0.3", "--metrics", "task")
    dry = pahq(*words, "--policies", "attention=e4m3,mlp=int8", "--out", tmp_path / "o")
    assert (dry.code, dry.err) == (0, "")
    assert dry.out.splitlines()[1].split() == ["ioi_gpt2_0.5_logit_diff_attention_e4m3_mlp_int8", "waiting"]
    assert dry.out.splitlines()[-1] == f"2 runs: 2 waiting; {tmp_path / 'o'}"
    assert not (tmp_path / "o").exists()
    more = ("--option", "task_options.prepend_bos=true", "--option", "split_qkv=false", "--seed", 3, "--device", "cpu")
    plain = json.loads(pahq(*words, "--json", *more).out)
    assert (plain["counts"]["waiting"], plain["out"]) == (2, "runs/sweep")
    assert "--n 4" not in plain["runs"][0]["command"]
    assert "--seed 3 --no-split-qkv --task-option prepend_bos=true" in plain["runs"][0]["command"]
    assert json.loads(pahq("sweep", "demo", "--dry-run", "--json", "-n", 4).out)["counts"]["waiting"] == 10


def test_how_far_a_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, events = tmp_path / "run.log", tmp_path / "events.jsonl"
    log.write_text("# then\n$ pahq discover\nloading\n")
    events.write_text('{"event": "progress", "number": 0, "phase": "acdc"}\n')
    meter = Meter(tmp_path, log, log.stat().st_size)
    assert meter.read() == "starting"
    with log.open("a") as file:
        file.write("# now\n$ pahq discover\n")
    assert meter.read() == "starting"
    with log.open("a") as file:
        file.write("loading <model> …\nhalf a li")
    assert meter.read() == "loading <model> …"
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    said = {
        "event": "progress",
        "number": 1,
        "phase": "acdc",
        "tests": 1000,
        "kept": 7,
        "metric": 0.5,
        "edges_left": 4000,
    }
    for later, more, text in (
        (0, {}, "1,000 edges tested, 7 kept, metric 0.5000"),
        (10, {"tests": 2000, "edges_left": 2000}, "2,000 edges tested, 7 kept, metric 0.5000, about 0:10 left"),
    ):
        clock[0] += later
        with events.open("a") as file:
            file.write(json.dumps(said | more) + "\n")
        assert meter.read() == text
    with events.open("a") as file:
        file.write('{"event": "progress", "number": 3, "phase": "eap-ig", "done": 3, "of": 12}\n{"torn')
    assert meter.read() == "eap-ig: 3 of 12"


def test_the_live_table(files: Path, tmp_path: Path) -> None:
    from rich.console import Console

    from pahq.report.progress import LiveWatch

    with (tmp_path / "screen").open("w+") as screen:
        watch = LiveWatch(screen)
        watch.console = Console(file=screen, force_terminal=True, width=100, height=20)
        lost, at_work, _ = rows = preview(plan(grid(files, 0.2, 0.1, 0.3), tmp_path / "out"))
        with LiveBoard({row["run"]: row for row in rows}, watch) as board:
            board.started(lost | {"state": "running"})
            lost |= {"state": "failed", "reason": "prompts: there is [bold]none; give some"}
            board.ended(lost)
            at_work["state"] = "running"
            board.started(at_work)
            board.refresh({at_work["run"]: lambda: "12 edges tested"})
        screen.seek(0)
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.read())
    assert "1 waiting, 1 running, 1 failed" in plain
    for words in (
        "failed +prompts_model_0.2_kl_div +prompts: there is \\[bold]none; give some",
        "running +prompts_model_0.1_kl_div +12 edges tested +\\d:\\d\\d",
        "waiting +prompts_model_0.3_kl_div",
    ):
        assert re.search(words, plain), words


def test_an_empty_live_table(tmp_path: Path) -> None:
    from pahq.report.progress import LiveWatch

    with (tmp_path / "screen").open("w+") as screen, LiveBoard({}, LiveWatch(screen)) as board:
        board.refresh({})


def test_a_job_ends_with_its_sweep(tmp_path: Path) -> None:
    """Without a sweep that holds its input open, a process is killed at once, whatever it is at."""
    command = [
        sys.executable,
        "-c",
        "import time, pahq.sweeps.job as job; job.runpy.run_module = lambda *_, **__: time.sleep(600); job.main()",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        time.sleep(0.3)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(300) == -signal.SIGKILL


def test_prompts_file_of_another_name(files: Path, tmp_path: Path) -> None:
    """Odd names stay within the folder."""
    save_prompts(tmp_path / "..odd name%<x>.jsonl")
    made = plan(grid(files, 0.1, tasks=str(tmp_path / "..odd name%<x>.jsonl")), tmp_path / "out")
    assert [run.name for run in made.runs] == ["odd_name_x_model_0.1_kl_div"]
