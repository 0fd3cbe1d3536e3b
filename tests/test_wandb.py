"""What Weights & Biases gets, read back from the files that it writes offline. No test leaves this machine."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pahq
from pahq.api import execute
from pahq.evaluation.circuit import TENSOR_FILE, Circuit
from pahq.evaluation.examples import Examples
from pahq.report import machine
from pahq.report.config import RunConfig
from pahq.report.progress import Watch
from pahq.report.tracking import tracker, wandb_sink
from pahq.report.tracking.event import flat
from pahq.report.tracking.jsonl import EVENTS_FILE, read_events
from pahq.report.tracking.settings import TRACKING_FILE, Tracking
from tiny import RandomTask, transformer
from wandb_files import HEADER, Offline, offline_runs
from wandb_server import Server

wandb = pytest.importorskip("wandb")


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """W&B keeps to a folder of ours and to itself. It reads its settings once in each process."""
    there = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):
            patch.setenv(f"WANDB_{name}_DIR", str(there / name.lower()))
        patch.setenv("HOME", str(there))  # where a key may lie
        patch.setenv("NETRC", str(there / "netrc"))
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_DISABLE_GIT", "true")
        patch.setenv("WANDB_DISABLE_CODE", "true")
        for name in ("STATS", "META", "MACHINE_INFO"):
            patch.setenv(f"WANDB__DISABLE_{name}", "true")
        patch.setattr(machine, "gemm_peak", lambda *_: 1e11)
        patch.setattr(tracker, "INTERVAL", 0.0)
        wandb.teardown()
        yield
        wandb.teardown()


def discover(out: Path | None, tracking: Tracking | None, **options: Any) -> Circuit:
    given = {"threshold": 1e-4, "metric": "kl_div", "n": 4, "view": False} | options
    return pahq.discover(transformer(2, 2), RandomTask(), out=out, tracking=tracking, **given)


def read(out: Path) -> list[Offline]:
    """The offline runs in a folder, once wandb's own process has written all of them."""
    wandb.teardown()
    return offline_runs(out)


def same_as(offline: Offline, events: list[dict[str, Any]]) -> None:
    """Fails unless W&B has these events, in its own way, and nothing else."""
    logged = offline.logged()
    for event in events:
        facts = {name: value for name, value in event.items() if name not in ("event", "number", "time")}
        if event["event"] == "started":
            for name, value in (facts.pop("config") | facts).items():
                assert offline.config[name] == value, name
        elif event["event"] == "progress":
            phase = facts.pop("phase")
            assert logged.pop(event["number"]) == {f"{phase}/{name}": value for name, value in facts.items()}
        else:
            tables, files = facts.pop("tables", {}), facts.pop("files", [])
            for name, value in flat(facts).items():
                assert offline.summary[name] == value, name
            assert offline.summary["state"] == event["event"]
            assert set(logged.pop(event["number"], {})) == set(tables)
            for name, table in tables.items():
                assert offline.table(name)["columns"] == table["columns"]
                assert len(offline.table(name)["data"]) == table["rows"]
            kinds = [kind for kind in offline.artifacts.values() if kind[0] != "run_table"]
            assert [kept for _, kept in kinds] == ([sorted(files)] if files else [])
    assert logged == {}


def test_the_same_events_go_to_the_file_and_to_wandb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my run"
    tracking = Tracking(mode="offline", project="p", group="g", tags=("a", "b c"))
    circuit = discover(out, tracking, progress=True)
    told = capsys.readouterr()
    assert told.out == ""
    first, *rest = told.err.splitlines()
    assert first.startswith("W&B: kept offline; send it with: wandb sync ")
    (place,) = shlex.split(first.removeprefix("W&B: kept offline; send it with: wandb sync "))
    assert Path(place).is_dir()
    assert rest == ["measuring the circuit …"]  # not a word of wandb's own

    (offline,) = read(out)
    same_as(offline, read_events(out / EVENTS_FILE))
    kept = json.loads((out / TRACKING_FILE).read_text())["wandb"]
    run = offline.run
    assert (run.run_id, run.project, run.run_group, run.display_name) == (kept["id"], "p", "g", "my run")
    assert (list(run.tags), run.job_type, offline.exit_code) == (["a", "b c"], "discover", 0)
    kinds = sorted(kind for kind, _ in offline.artifacts.values())
    assert kinds == ["circuit", "run_table"]
    rows = {(sender, receiver): rest for sender, receiver, *rest in offline.table("edges")["data"]}
    assert len(rows) == circuit.n_tested
    for edge in circuit.edges():
        assert rows[edge.sender, edge.receiver] == [edge.effect, edge.order, True]
    sent = {file.name for file in (offline.folder / "files").rglob("*") if file.is_file()}
    assert not {name for name in sent if "diff" in name or name.endswith((".py", ".patch", ".log"))}, sent


def test_a_scored_run_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # it remembers where it began
    discover(None, Tracking(mode="offline"), method="exact", threshold=None, edges=20)
    (offline,) = read(tmp_path)
    assert offline.run.project == "pahq"
    assert [kind for kind, _ in offline.artifacts.values()] == ["run_table"]  # no folder, no files
    last = max(offline.logged())
    assert offline.logged()[last - 1]["exact/done"] == offline.logged()[last - 1]["exact/of"]
    assert len(offline.table("edges")["data"]) == offline.summary["size/addition"] + offline.summary["size/direct"]


def test_evaluations_are_tracked_where_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = transformer(2, 2), RandomTask()
    for name, threshold in (("loose", 1e-2), ("tight", 1e-4)):
        discover(tmp_path / name, None, threshold=threshold)
    runs, out = [tmp_path / "loose", tmp_path / "tight"], tmp_path / "out"
    how: dict[str, Any] = {"model": model, "task": task, "bootstrap": 0}
    few: dict[str, Any] = {"knockouts": 2, "removals": 2, "random_circuits": 1}
    pahq.evaluate(runs, out, **how, **few)
    assert not {EVENTS_FILE, TRACKING_FILE, "wandb"} & {entry.name for entry in out.iterdir()}

    record = pahq.evaluate(runs, out, tracking=Tracking(mode="offline", project="p"), **how, **few)
    (offline,) = read(out)
    events = read_events(out / EVENTS_FILE)
    same_as(offline, events)
    assert [event["event"] for event in events] == ["started", *["progress"] * (len(events) - 2), "finished"]
    assert events[0]["config"] == json.loads(json.dumps(record["options"]))
    assert events[-2]["done"] == events[-2]["of"] > 5
    assert (offline.run.job_type, offline.run.project, offline.exit_code) == ("evaluate", "p", 0)
    recovered = events[-1]["results"]
    for row in record["runs"]:
        assert recovered[row["name"]]["recovered"] == row["circuit"]["recovered"]
        assert offline.summary[f"results/{row['name']}/recovered"] == row["circuit"]["recovered"]
    assert {"evaluation.json", "evaluation.csv"} <= set(offline.artifacts[f"evaluate-{offline.run.run_id}"][1])
    assert offline.table("evaluation")["columns"][0] == "name"

    # An interrupted comparison goes on in the same W&B run, a new one takes a new one.
    plain, left = Examples._logits, [3]

    def interrupted(self: Examples, mask: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return plain(self, mask)

    monkeypatch.setattr(Examples, "_logits", interrupted)
    out = tmp_path / "compared"
    with pytest.raises(KeyboardInterrupt):
        pahq.compare(runs, out, tracking=Tracking(mode="offline"), **how)
    id = json.loads((out / TRACKING_FILE).read_text())["wandb"]["id"]
    empty = out / "wandb" / f"offline-run-20260101_000000-{id}"  # killed before anything was written
    empty.mkdir()
    (empty / f"run-{id}.wandb").write_bytes(HEADER)
    pahq.compare(runs, out, **how)
    assert not empty.exists()
    events = read_events(out / EVENTS_FILE)
    kinds = [event["event"] for event in events if event["event"] != "progress"]
    assert kinds == ["started", "stopped", "started", "finished"]
    first, second = read(out)
    assert first.run.run_id == second.run.run_id
    assert (first.exit_code, second.exit_code, second.run.job_type) == (130, 0, "compare")
    pahq.compare(runs, out, tracking=Tracking(mode="offline"), **how)
    assert [event["event"] for event in read_events(out / EVENTS_FILE)].count("started") == 1
    assert len({offline.run.run_id for offline in read(out)}) == 2
    assert read_events(out / EVENTS_FILE)[0]["resumed"] is False


def test_where_wandb_is_switched_off_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.teardown()
    assert discover(tmp_path / "run", Tracking()).n_edges > 0
    wandb.teardown()
    assert not {TRACKING_FILE, "wandb"} & {entry.name for entry in (tmp_path / "run").iterdir()}
    assert read_events(tmp_path / "run" / EVENTS_FILE)[-1]["event"] == "finished"


def test_a_run_that_fails_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the machine\nis on fire")

    monkeypatch.setattr("pahq.api.behaviour", fail)
    with pytest.raises(RuntimeError, match="on fire"):
        discover(tmp_path / "run", Tracking(mode="offline"))
    (offline,) = read(tmp_path / "run")
    assert offline.exit_code == 1
    assert offline.summary["reason"] == "the machine is on fire"
    same_as(offline, read_events(tmp_path / "run" / EVENTS_FILE))


def test_a_failure_of_wandb_on_the_way_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no room\nfor rows")

    monkeypatch.setattr(wandb.Run, "log", fail)
    circuit = discover(tmp_path / "run", Tracking(mode="offline"), progress=True)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert notes == ["note: W&B failed (no room for rows); the run goes on without it"]
    assert read_events(tmp_path / "run" / EVENTS_FILE)[-1]["event"] == "finished"
    assert circuit.n_edges > 0
    assert read(tmp_path / "run")[0].exit_code == 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "wandb: No API key configured"),
        ({"WANDB_API_KEY": "short"}, "wandb: WANDB_API_KEY invalid: API key must have 40"),
        ({"WANDB_API_KEY": "0" * 40}, "wandb: .*connection refused"),
    ],
)
def test_wandb_that_cannot_be_reached_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(wandb_sink, "PATIENCE", 0.5)
    wandb.teardown()
    with pytest.raises(pahq.PahqError, match=message) as refused:
        pahq.discover("no-such-model", RandomTask(), 0.1, out=tmp_path / "run", tracking=Tracking())
    wandb.teardown()
    assert str(refused.value).endswith("; mend that, take --wandb-mode offline, or --no-wandb")
    assert capfd.readouterr() == ("", "")
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == [".lock"]
    assert discover(tmp_path / "run", None).n_edges > 0  # the folder is as good as new


class Leaving(Watch):
    """The server is gone after some batches of decisions."""

    def __init__(self, server: Server, batches: int) -> None:
        self.server, self.left = server, batches
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def update(self, progress: Any) -> None:
        self.left -= 1
        self.server.gone = self.server.gone or self.left == 0


@pytest.mark.parametrize("batches", [0, 3])
def test_online_and_when_the_server_leaves_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    server = Server()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_sink, "UPLOAD_PATIENCE", 2.0)
    wandb.teardown()
    watch, out = Leaving(server, batches), tmp_path / "run"
    config = RunConfig("object:Transformer", "object:random", 1e-4, metric="kl_div", n=4)
    given = {"model": transformer(2, 2), "task": RandomTask(), "view": False}
    circuit = execute(config, out, watch=watch, tracking=Tracking(project="p"), **given).circuit
    wandb.teardown()
    server.close()
    kept = json.loads((out / TRACKING_FILE).read_text())["wandb"]
    assert (kept["mode"], kept["entity"]) == ("online", "me")
    assert kept["url"] == f"{server.url}/me/p/runs/{kept['id']}"
    assert watch.said[:2] == [f"W&B: {kept['url']}", "measuring the circuit …"]
    events = read_events(out / EVENTS_FILE)
    assert events[-1]["event"] == "finished"
    assert circuit.n_edges == discover(None, None).n_edges
    sent = {row["_step"]: row for row in server.stream.get("wandb-history.jsonl", [])}
    progress = {event["number"]: event for event in events if event["event"] == "progress"}
    if batches:
        (note,) = watch.said[2:]
        assert note.startswith("note: W&B failed (")
        assert set(sent) <= set(progress)
    else:
        assert watch.said[2:] == []
        for number, event in progress.items():
            facts = {name: event[name] for name in event.keys() - {"event", "number", "time", "phase"}}
            assert {f"acdc/{name}": value for name, value in facts.items()}.items() <= sent.pop(number).items()
        (last,) = sent.values()
        assert last["edges"]["nrows"] == circuit.n_tested
        assert "CreateArtifact" in server.operations


def test_killed_interrupted_and_bereft_runs(tmp_path: Path) -> None:
    script = Path(__file__).parent / "tracked_runs.py"
    wandb.teardown()  # or it would be the children's, too
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["codes"] == {"untracked": [0], "resumed": [-9, 130, 0], "bereft": [0]}
    circuit = (tmp_path / "untracked" / TENSOR_FILE).read_bytes()
    assert not (tmp_path / "untracked" / "wandb").exists()

    out = tmp_path / "resumed"
    assert (out / TENSOR_FILE).read_bytes() == circuit
    events = read_events(out / EVENTS_FILE)
    assert [event["number"] for event in events] == list(range(len(events)))
    starts = [event["number"] for event in events if event["event"] == "started"]
    assert len(starts) == 3
    parts = [events[a:b] for a, b in zip(starts, [*starts[1:], len(events)], strict=True)]
    assert [part[-1]["event"] for part in parts] == ["progress", "stopped", "finished"]
    runs = offline_runs(out)
    assert [run.exit_code for run in runs] == [None, 130, 0]
    assert len({run.folder.name.rpartition("-")[2] for run in runs}) == 1  # all of them parts of one run
    for run, part in zip(runs[1:], parts[1:], strict=True):
        assert (run.run.project, list(run.run.tags)) == ("p", ["a"])
        same_as(run, part)
    assert set(runs[0].logged()) <= {event["number"] for event in parts[0]}  # what was on its way may be lost
    server = Server()
    environment = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
    (send,) = {line for line in found["said"]["resumed"] if "/*run-" in line}  # the same of both that went on
    sync = f"{Path(sys.executable).parent}/" + send.partition("send it with: ")[2].replace("sync", "sync --yes", 1)
    subprocess.run(sync, shell=True, check=True, cwd=tmp_path, capture_output=True, timeout=200, env=environment)
    server.close()
    steps = [row["_step"] for row in server.stream["wandb-history.jsonl"]]
    assert steps == sorted(step for run in runs for step in run.logged())
    assert len(steps) > 10
    again = [line for line in found["said"]["resumed"] if line.startswith("going on after ")]
    assert again[-1] != "going on after 0 decisions"

    assert (tmp_path / "bereft" / TENSOR_FILE).read_bytes() == circuit
    notes = [line for line in found["said"]["bereft"] if line.startswith("note: W&B")]
    assert len(notes) == 1
    assert notes[0].startswith("note: W&B failed (")
    assert read_events(tmp_path / "bereft" / EVENTS_FILE)[-1]["event"] == "finished"
