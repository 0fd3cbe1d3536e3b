"""Events of a run: what they tell and when, and that they change nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import commands
import pahq
from commands import Pahq, small_files
from pahq.api import execute
from pahq.evaluation.circuit import TENSOR_FILE, Circuit
from pahq.report import machine
from pahq.report.config import RunConfig
from pahq.report.progress import Watch
from pahq.report.tracking import opening, tracker
from pahq.report.tracking.event import Event, flat
from pahq.report.tracking.jsonl import EVENTS_FILE, Jsonl, read_events
from pahq.report.tracking.settings import TRACKING_FILE, Tracking, read_kept, write_kept
from pahq.report.tracking.tracker import Tracker
from tiny import RandomTask, transformer

CONFIG = RunConfig("object:Transformer", "object:random", 1e-4, metric="kl_div", n=4)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gemm_peak", lambda *_: 1e11)


@pytest.fixture
def pahq_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Pahq:
    return commands.make(capsys, monkeypatch)


class Kept:
    """A sink that keeps events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.codes: list[int] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def close(self, code: int) -> None:
        self.codes.append(code)


def run(out: Path | None, watch: Watch | None = None, **options: Any) -> Circuit:
    config = RunConfig(**(CONFIG.to_dict() | options))
    return execute(config, out, model=transformer(2, 2), task=RandomTask(), watch=watch, view=False).circuit


class Stopping(Watch):
    """Raises ``error`` after some batches of decisions."""

    def __init__(self, error: BaseException, batches: int = 2) -> None:
        self.error, self.left = error, batches

    def update(self, progress: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


def test_progress_comes_once_a_second_and_its_last_state_is_never_lost() -> None:
    now, sink = [100.0], Kept()
    with Tracker([sink], clock=lambda: now[0], measure=lambda: {"host_bytes": 1}) as told:
        told.started({})
        for step in range(95):  # nine seconds and a half, ten steps in each
            told.progress("first", {"done": step})
            now[0] += 0.1
        told.progress("second", {"done": 0})
        told.finished({"score": 1})
    progress = [event.facts for event in sink.events if event.kind == "progress"]
    first = [facts["done"] for facts in progress if facts["phase"] == "first"]
    assert 10 <= len(first) <= 12
    assert first[0] == 0
    assert first[-1] == 94
    assert progress[-1] == {"phase": "second", "done": 0, "host_bytes": 1}
    assert [event.number for event in sink.events] == list(range(len(sink.events)))
    assert sink.events[-1].kind == "finished"
    assert sink.codes == [0]


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (KeyboardInterrupt(), "interrupted", 130),
        (ValueError("no\nluck"), "no luck", 1),
        (ValueError(), "ValueError", 1),
    ],
)
def test_a_run_that_stops_says_why(error: BaseException, reason: str, code: int) -> None:
    sink = Kept()

    def stop() -> None:
        with Tracker([sink]) as told:
            told.started({})
            told.progress("search", {"done": 1})
            told.progress("search", {"done": 2})
            raise error

    with pytest.raises(type(error)):
        stop()
    assert [event.kind for event in sink.events] == ["started", "progress", "progress", "stopped"]
    assert sink.events[-1].facts == {"reason": reason}
    assert sink.codes == [code]


def test_nothing_is_told_of_a_run_that_never_began() -> None:
    sink = Kept()

    def stop() -> None:
        with Tracker([sink]) as told:
            told.progress("loading", {"done": 1})
            raise ValueError("early")

    with pytest.raises(ValueError, match="early"):
        stop()
    assert (sink.events, sink.codes) == ([], [1])


def test_lines_go_on_after_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / EVENTS_FILE
    for process in range(3):
        lines = Jsonl(path)
        assert lines.number == 2 * process
        for number in (lines.number, lines.number + 1):
            lines.emit(Event("progress", number, "now", {"metric": math.nan, "name": "é</script>"}))
        lines.close(0)
        with path.open("ab") as file:
            file.write(b'{"event": "progress", "number": 17, "ti')
    whole = path.read_bytes().rpartition(b"\n")[0].decode().splitlines()
    assert [json.loads(line)["number"] for line in whole] == list(range(6))
    assert json.loads(whole[0])["metric"] is None
    assert [event["number"] for event in read_events(path)] == list(range(6))


@pytest.mark.parametrize(
    "damage", [b"\0" * 40, b"[1, 2]", b'{"number": 3}', b'{"event": "progress", "number": true}', b"\xff"]
)
def test_damaged_lines_are_passed_over(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / EVENTS_FILE
    lines = [json.dumps(Event("progress", number, "now", {}).to_json()).encode() for number in range(2)]
    path.write_bytes(b"\n".join([lines[0], damage, lines[1], damage, b""]))
    assert [event["number"] for event in read_events(path)] == [0, 1]
    assert Jsonl(path).number == 2


def test_flat_keeps_plain_values() -> None:
    assert flat({"a": {"b": 1, "c": {"d": "x"}}, "e": [1], "f": None, "g": True}) == {"a/b": 1, "a/c/d": "x", "g": True}


def test_a_run_tells_its_start_its_progress_and_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "INTERVAL", 0.0)
    circuit = run(tmp_path / "run", policy="bf16")
    events = read_events(tmp_path / "run" / EVENTS_FILE)
    kinds = [event["event"] for event in events]
    assert kinds == ["started", *["progress"] * (len(events) - 2), "finished"]
    started, last, finished = events[0], events[-2], events[-1]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    for name in ("command", "config", "identity", "versions", "commit", "machine", "source"):
        assert started[name] == record[name]
    assert started["precision"]["policy"] == record["precision"]["policy"]
    assert started["resumed"] is False
    assert {event["phase"] for event in events[1:-1]} == {"acdc"}
    tests = [event["tests"] for event in events[1:-1]]
    assert tests == sorted(set(tests))
    assert len(tests) > 3
    assert last["tests"] == circuit.n_tested == last["kept"] + last["removed"]
    assert last["edges_left"] == 0
    assert last["refined_share"] == record["precision"]["refined_share"] > 0
    assert last["states"] == record["search"]["states"]
    assert last["host_bytes"] > 2**20
    assert {name: finished[name] for name in ("search", "precision", "total_seconds")} == {
        name: record[name] for name in ("search", "precision", "total_seconds")
    }
    assert finished["tables"]["edges"]["rows"] == circuit.n_tested
    assert set(finished["files"]) >= {"circuit.json", "circuit.safetensors", "run.json", "journal.jsonl", EVENTS_FILE}
    assert not {".lock", TRACKING_FILE} & set(finished["files"])


def test_events_change_no_circuit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "INTERVAL", 0.0)
    circuit = run(tmp_path / "run")
    untold = run(None)
    untold.save(tmp_path / "untold")
    assert (tmp_path / "run" / TENSOR_FILE).read_bytes() == (tmp_path / "untold" / TENSOR_FILE).read_bytes()
    assert circuit.n_tested > 20


def test_phases_of_a_prefiltered_run_and_of_a_scored_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "INTERVAL", 0.0)
    run(tmp_path / "a", prefilter="eap-ig", keep=0.5, metric="logit_diff")
    events = read_events(tmp_path / "a" / EVENTS_FILE)
    phases = [event["phase"] for event in events if event["event"] == "progress"]
    assert list(dict.fromkeys(phases)) == ["eap-ig", "acdc"]
    run(tmp_path / "b", method="exact", threshold=None, edges=20)
    progress = [event for event in read_events(tmp_path / "b" / EVENTS_FILE) if event["event"] == "progress"]
    assert progress[-1]["phase"] == "exact"
    assert progress[-1]["done"] == progress[-1]["of"] > 1
    finished = read_events(tmp_path / "b" / EVENTS_FILE)[-1]
    assert "scores.safetensors" in finished["files"]
    assert finished["search"]["selection"]["edges"] == 20


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the machine is on fire")])
def test_a_run_goes_on_in_the_same_file(tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "INTERVAL", 0.0)
    out = tmp_path / "run"
    with pytest.raises(type(error)):
        run(out, Stopping(error, 3))
    with (out / EVENTS_FILE).open("ab") as file:
        file.write(b'{"event": "prog')  # as a kill would leave it
    circuit = run(out)
    events = read_events(out / EVENTS_FILE)
    assert [event["number"] for event in events] == list(range(len(events)))
    kinds = [event["event"] for event in events if event["event"] != "progress"]
    assert kinds == ["started", "stopped", "started", "finished"]
    assert [event["resumed"] for event in events if event["event"] == "started"] == [False, True]
    assert next(e["reason"] for e in events if e["event"] == "stopped") == (str(error) or "interrupted")
    assert len((out / EVENTS_FILE).read_bytes().splitlines()) == len(events)
    run(tmp_path / "whole")
    assert (out / TENSOR_FILE).read_bytes() == (tmp_path / "whole" / TENSOR_FILE).read_bytes()
    before = (out / EVENTS_FILE).read_bytes()
    assert run(out).n_edges == circuit.n_edges  # a finished run is only read
    assert (out / EVENTS_FILE).read_bytes() == before


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Stopping(KeyboardInterrupt(), 1))
    (tmp_path / "run" / EVENTS_FILE).unlink()
    (tmp_path / "run" / EVENTS_FILE).mkdir()
    with pytest.raises(pahq.PahqError, match=r"events\.jsonl: a folder lies where a file is needed"):
        run(tmp_path / "run")


def test_the_table_has_the_circuit_first(monkeypatch: pytest.MonkeyPatch) -> None:
    circuit = run(None)
    table = opening.circuit_table(circuit)
    frame = circuit.to_dataframe("tested")
    assert len(table.rows) == len(frame) > circuit.n_edges
    assert sorted(map(tuple, table.rows)) == sorted(
        frame[list(table.columns)].itertuples(index=False, name=None)  # pyright: ignore[reportAttributeAccessIssue]
    )
    assert [row[4] for row in table.rows] == [True] * circuit.n_edges + [False] * (len(frame) - circuit.n_edges)
    sizes = [abs(row[2]) for row in table.rows[: circuit.n_edges]]
    assert sizes == sorted(sizes, reverse=True)
    monkeypatch.setattr(opening, "ROWS", 5)
    short = opening.circuit_table(circuit)
    assert (list(short.rows), short.left_out) == (list(table.rows)[:5], len(frame) - 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "ofline"}, "wandb mode: 'ofline' is unknown; known: online, offline"),
        ({"project": "a/b"}, r"wandb project: 'a/b' holds '/'; W&B takes none of"),
        ({"project": " "}, r"wandb project: ' ' cannot be; give text of 1 to 128 characters"),
        ({"name": "x" * 129}, "wandb name: "),
        ({"tags": ("a", "")}, "wandb tags: '' cannot be; give texts of 1 to 64 characters"),
        ({"tags": "a,b"}, "wandb tags: 'a,b' is text; give a list of texts"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pahq.PahqError, match=message):
        Tracking(**options)


def test_a_run_that_goes_on_keeps_its_settings(tmp_path: Path) -> None:
    kept = {"id": "abc", "mode": "offline", "project": "p", "entity": None, "group": "g", "name": "n", "tags": ["t"]}
    assert read_kept(tmp_path) is None
    write_kept(tmp_path, kept)
    assert read_kept(tmp_path) == kept
    found = Tracking(mode="online", entity="me").after(kept, tmp_path)
    assert found == Tracking(True, "online", "p", "me", "g", "n", ("t",))
    with pytest.raises(pahq.PahqError, match="is tracked in the project 'p', not in 'q'; leave --wandb-project out"):
        Tracking(project="q").after(kept, tmp_path)
    (tmp_path / TRACKING_FILE).write_text('{"format": "pahq-tracking-1", "wandb": {"id": 3}}')
    with pytest.raises(pahq.PahqError, match=r"tracking\.json: the file is damaged .*; remove it"):
        read_kept(tmp_path)


def test_without_wandb_one_line_says_so_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    out = tmp_path / "run"
    with pytest.raises(pahq.PahqError, match=r"wandb: it cannot be imported .*pip install 'pahq\[wandb\]'"):
        pahq.discover("no-such-model", RandomTask(), 0.1, out=out, tracking=Tracking(mode="offline"))
    assert [entry.name for entry in out.iterdir()] == [".lock"]
    assert run(out).n_edges > 0  # nothing stands in the way of the run without it


def test_options_on_the_command_line_and_in_a_file(
    tmp_path: Path, pahq_command: Pahq, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def open_tracker(settings: Any, *_: Any) -> Tracker:
        asked.append(settings)
        raise pahq.PahqError("enough")

    monkeypatch.setattr("pahq.api.open_tracker", open_tracker)
    files = small_files(tmp_path)
    words = ["discover", *commands.options(files, threshold=0.1, out=tmp_path / "run")]
    more = ["--wandb-mode", "offline", "--wandb-tags", "a, b", "--wandb-entity", "me", "--wandb-project", "p"]
    more += ["--wandb-name", "n", "--wandb-group", "g"]
    whole = Tracking(True, "offline", "p", "me", "g", "n", ("a", "b"))
    assert pahq_command(*words, "--wandb", *more).error == "enough"
    assert pahq_command(*words).error == "enough"
    assert pahq_command(*words, "--no-wandb").error == "enough"
    (tmp_path / "run.yaml").write_text("wandb: true\nwandb-mode: offline\nwandb_tags: x\n")
    assert pahq_command(*words, "--config", tmp_path / "run.yaml", "--wandb-group", "g").error == "enough"
    assert asked == [whole, None, Tracking(wandb=False), Tracking(mode="offline", group="g", tags=("x",))]
    assert pahq_command(*words, *more).error.startswith("wandb-mode: 'offline' goes with --wandb; ")
    assert pahq_command(*words, "--no-wandb", "--wandb-name", "n").error.startswith("wandb-name: 'n' goes with --wandb")
