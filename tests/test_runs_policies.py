"""Whole runs under precision policies: resuming, determinism, records, streams and traces."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pahq.api import execute
from pahq.errors import PahqError
from pahq.method import acdc
from pahq.method.acdc import Decision
from pahq.report import journal, machine, summary
from pahq.report.config import RunConfig
from pahq.report.journal import JOURNAL_FILE
from pahq.report.precision import merged_check
from pahq.report.progress import PlainWatch, Watch
from tiny import RandomTask, transformer

CONFIG = RunConfig("object:Transformer", "object:random", 0.0005, metric="kl_div", n=4)
POLICIES = ["bf16", "int8", "pahq", "pahq-values", "rtn", "attention=e5m2,mlp=int8"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many checkpoints in a small run, and no time spent on measuring the machine."""
    monkeypatch.setattr(acdc, "CHECKPOINT_TESTS", 40)
    monkeypatch.setattr(machine, "gemm_peak", lambda *_: 1e11)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(out: Path | None, *, watch: Watch | None = None, streams: Any = None, trace: Any = None, **options: Any) -> Any:
    config = replace(CONFIG, **options)
    model = transformer(3, 4)
    return execute(config, out, model=model, task=RandomTask(), watch=watch, streams=streams, trace=trace)


def found(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "circuit.safetensors").read_bytes(), (folder / "circuit.json").read_bytes()


def cut(whole: Path, out: Path, at: int) -> Path:
    """The folder of a run whose process was killed when its journal had ``at`` bytes."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    shutil.copy(whole / "start.json", out)
    (out / JOURNAL_FILE).write_bytes((whole / JOURNAL_FILE).read_bytes()[:at])
    return out


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_cut_anywhere_ends_in_the_same_circuit(tmp_path: Path, policy: str) -> None:
    options: dict[str, Any] = {"policy": policy, "check": True} | ({"threshold": 0.002} if policy == "rtn" else {})
    whole = run(tmp_path / "whole", **options)
    assert whole.circuit.n_tested > 100
    size = (tmp_path / "whole" / JOURNAL_FILE).stat().st_size
    assert (tmp_path / "whole" / JOURNAL_FILE).read_bytes().count(b'"checkpoint": true') >= 2
    precision = whole.record["precision"]
    for at in (0, size // 3, size // 2, size - 100):
        resumed = run(cut(tmp_path / "whole", tmp_path / "cut", at), **options)
        assert resumed.record["search"]["resumes"] == 1
        assert found(tmp_path / "cut") == found(tmp_path / "whole"), at
        again = resumed.record["precision"]
        # A state may have been evaluated in FP32 twice, and copies of weights are made when needed;
        # everything else is about decisions. (The check's own rounding depends on where it began.)
        assert again["exact_states"] >= precision["exact_states"]
        for name in ("refined", "refined_share", "largest_error", "measured_both_ways", "margin", "exact", "policy"):
            assert again[name] == precision[name]
        for name in ("checked", "within_noise"):
            assert again["check"][name] == precision["check"][name]
        named = [[(one["edge"], one["order"]) for one in r["check"]["disagreements"]] for r in (precision, again)]
        assert named[0] == named[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_run_twice_leaves_the_same_circuit(tmp_path: Path, policy: str) -> None:
    for name in ("one", "two"):
        run(tmp_path / name, policy=policy, threshold=0.002)
    assert found(tmp_path / "one") == found(tmp_path / "two")


@pytest.mark.parametrize(
    ("policy", "under_test"),
    [("pahq", None), ("bf16", None), ("bf16", "receiver"), ("int8", "sender"), ("e4m3", None), (POLICIES[-1], None)],
)
def test_exact_runs_find_the_circuit_of_fp32(policy: str, under_test: str | None) -> None:
    exact = run(None, policy=policy, under_test=under_test)
    plain = run(None, policy=policy, under_test=under_test, exact=False)
    assert (exact.circuit.mask == run(None).circuit.mask).all()
    precision = exact.record["precision"]
    assert precision["exact"] is True
    assert 0 < precision["refined"] < exact.circuit.n_tested
    assert precision["refined_share"] == precision["refined"] / exact.circuit.n_tested
    assert (plain.record["precision"]["exact"], plain.record["precision"]["refined"]) == (False, 0)


def test_what_is_under_test_can_be_chosen() -> None:
    chosen = run(None, policy="pahq-values", under_test="none")
    assert chosen.record["precision"]["policy"]["under_test"] == "none"
    assert chosen.record["config"]["under_test"] == "none"
    assert not (chosen.circuit.effects == run(None, policy="pahq-values").circuit.effects).all()


def decision(order: int, **more: Any) -> Decision:
    return Decision(order, 1, 2, 0.25, 1 / 3, True, True, **more)


def test_journal_keeps_what_low_precision_taught_bit_for_bit(tmp_path: Path) -> None:
    decisions = [
        decision(0),
        decision(1, refined=True, error=0.1 + 0.2, moved=1e-300),
        decision(2, error=5e-324, moved=2 / 3),
        decision(3, refined=True),
        decision(4, error=0.0, moved=0.0),
    ]
    with journal.Journal(tmp_path / "j", lambda row, column: "edge") as open_journal:
        open_journal.append(decisions, {})
    assert journal.read(tmp_path / "j") == (decisions, {})
    lines = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
    assert not {"refined", "error", "moved"} & set(lines[0])
    assert {"refined", "error", "moved"} <= set(lines[1])


@pytest.mark.parametrize(
    "more",
    [
        {"refined": 1},
        {"refined": None},
        {"error": "0", "moved": 1.0},
        {"error": True, "moved": 1.0},
        {"error": 1.0, "moved": None},
        {"error": 1.0},
        {"moved": 1.0},
    ],
)
def test_fields_of_the_wrong_type_are_damage(tmp_path: Path, more: dict[str, Any]) -> None:
    good = journal.to_line(decision(0), "edge")
    (tmp_path / "j").write_text(json.dumps(json.loads(good) | more) + "\n" + good)
    with pytest.raises(PahqError, match="line 1 is damaged"):
        journal.read(tmp_path / "j")


@pytest.mark.parametrize("wrong", [3, [3], [{}], [{"order": "1"}]])
def test_disagreements_of_the_wrong_type_are_damage(tmp_path: Path, wrong: Any) -> None:
    good = journal.to_line(decision(0), "edge")
    (tmp_path / "j").write_text(json.dumps({"spent": {"disagreements": wrong}}) + "\n" + good)
    with pytest.raises(PahqError, match="line 1 is damaged"):
        journal.read(tmp_path / "j")


def test_journal_gathers_disagreements_up_to_the_checkpoint(tmp_path: Path) -> None:
    def edge(row: int, column: int) -> str:
        return "edge"

    with journal.Journal(tmp_path / "j", edge) as open_journal:
        open_journal.append([decision(0)], {"states": 1, "disagreements": [{"order": 0}]})
        open_journal.append([decision(1)], {"states": 2})
        later = replace(decision(2), checkpoint=False)
        open_journal.append([later], {"states": 3, "disagreements": [{"order": 1}, {"order": 2}]})
    decisions, spent = journal.read(tmp_path / "j")
    assert spent == {"states": 3, "disagreements": [{"order": 0}, {"order": 1}]}
    journal.cut(tmp_path / "j", decisions, spent, edge)
    assert journal.read(tmp_path / "j") == (decisions, spent)


def test_checks_of_several_processes_add_up() -> None:
    near, far = {"order": 3, "within_noise": True}, {"order": 9, "within_noise": False}
    now = {"checked": 5, "disagreements": [far], "within_noise": 0, "largest_error": 0.1}
    assert merged_check([near], 7, 0.2, now) == {
        "checked": 12,
        "disagreements": [near, far],
        "within_noise": 1,
        "largest_error": 0.2,
    }


def test_a_policy_file_is_remembered_by_path_and_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"formats": {"mlp": "bf16"}}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(table))
    monkeypatch.chdir(tmp_path)
    first = run(tmp_path / "run", policy="mine.json")
    assert first.record["config"]["policy"] == str(file)
    start = json.loads((tmp_path / "run" / "start.json").read_text())
    assert start["policy"] == first.record["precision"]["policy"]
    assert start["policy"]["formats"]["mlp"] == "bf16"
    circuit = found(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    file.write_text(json.dumps({"formats": {"mlp": "int8"}}))
    with pytest.raises(PahqError, match=r"policy '.*mine\.json' is no longer what this run began with"):
        run(tmp_path / "run", policy="mine.json")
    file.write_text(json.dumps(table, indent=1))  # the same table in other letters
    assert not run(tmp_path / "run", policy="mine.json").was_finished
    assert found(tmp_path / "run") == circuit


def test_another_policy_is_another_run(tmp_path: Path) -> None:
    run(tmp_path / "run", policy="bf16")
    for option, value in (("policy", "int8"), ("under_test", "both"), ("exact", False), ("check", True)):
        with pytest.raises(PahqError, match=rf"another run \({option} is"):
            run(tmp_path / "run", **{"policy": "bf16", option: value})


def shown(outcome: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    summary.show(outcome.circuit, outcome.record, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_record_and_summary_tell_how_precision_fared(tmp_path: Path) -> None:
    outcome = run(tmp_path / "run", policy="pahq", check=True)
    precision = outcome.record["precision"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["precision"] == precision
    assert summary.as_json(outcome.circuit, outcome.record)["precision"] == precision
    assert precision["policy"]["formats"]["q"] == "e4m3"
    assert precision["largest_error"] > 0
    assert precision["margin"]["typical"] > precision["margin"]["noise"] > 0
    assert precision["check"]["checked"] == outcome.circuit.n_tested
    held = {(one["component"], one["format"], one["place"]): one["bytes"] for one in precision["weights"]}
    assert held["q", "fp32", "host"] == 3 * 4 * 32 * 8 * 4
    assert 0 < held["q", "e4m3", "device"] < held["q", "fp32", "host"] / 2
    assert precision["weight_bytes"]["host"] == sum(n for (_, _, place), n in held.items() if place == "host")
    assert precision["weight_bytes"]["device"] == sum(n for (_, _, place), n in held.items() if place == "device")
    text = shown(outcome)
    for words in (
        "policy pahq: ",
        "q, k, v, o in e4m3",
        "decisions in FP32 (",
        "largest error seen",
        "margin",
        "check: 0 of",
    ):
        assert words in text, text
    for words in ("fp32, host", "e4m3, device", "bf16, device", "total", "peak memory"):
        assert words in text, text


def test_summary_names_the_first_disagreements() -> None:
    outcome = run(None, policy="rtn", check=True, threshold=0.002)
    beyond = [one for one in outcome.record["precision"]["check"]["disagreements"] if not one["within_noise"]]
    assert len(beyond) > 3
    text = shown(outcome)
    assert f"check: {len(beyond)} of {outcome.circuit.n_tested} decisions differ from FP32's" in text
    assert beyond[0]["edge"] in text
    assert ", …" in text
    assert "no decision in FP32" in text


def test_summary_of_fp32_stays_short() -> None:
    text = shown(run(None))
    assert "weights 0.1 MiB in FP32\n" in text
    for words in ("policy", "margin", "check", "host"):
        assert words not in text
    assert "check: 0 of" in shown(run(None, check=True))


def test_summary_of_a_record_from_before_there_were_policies() -> None:
    outcome = run(None)
    outcome.record["precision"] = "fp32"
    assert "weights" not in shown(outcome)


def test_streams_and_traces_leave_the_circuit_alone(tmp_path: Path) -> None:
    """Neither belongs to the run's options, so that it can be resumed with others."""
    run(tmp_path / "plain", policy="pahq")
    for name, streams in (("none", "none"), ("two", "low, load"), ("all", "load,low,high")):
        trace = tmp_path / f"{name}.json"
        outcome = run(tmp_path / name, policy="pahq", streams=streams, trace=trace)
        assert found(tmp_path / name) == found(tmp_path / "plain")
        wanted = {"none": [], "two": ["load", "low"], "all": ["load", "low", "high"]}[name]
        assert outcome.record["search"]["streams"] == wanted
        assert json.loads(trace.read_text())["otherData"]["dropped"] == 0
    size = (tmp_path / "plain" / JOURNAL_FILE).stat().st_size
    run(cut(tmp_path / "plain", tmp_path / "cut", size // 2), policy="pahq", streams="none")
    assert found(tmp_path / "cut") == found(tmp_path / "plain")


def test_an_interrupted_run_leaves_its_trace(tmp_path: Path) -> None:
    class Impatient(Watch):
        def update(self, progress: Any) -> None:
            raise KeyboardInterrupt

    trace = tmp_path / "run" / "trace.json"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", policy="pahq", trace=trace, watch=Impatient())
    assert json.loads(trace.read_text())["traceEvents"]
    run(tmp_path / "run", policy="pahq", trace=trace)
    run(tmp_path / "whole", policy="pahq")
    assert found(tmp_path / "run") == found(tmp_path / "whole")


def test_an_empty_trace_is_said(tmp_path: Path) -> None:
    stream = io.StringIO()
    run(None, trace=tmp_path / "t.json", watch=PlainWatch(stream))  # all FP32: there is nothing to put on streams
    assert "nothing ran on the streams" in stream.getvalue()
    assert json.loads((tmp_path / "t.json").read_text())["otherData"]["spans"] == 0


def test_a_finished_run_leaves_no_trace(tmp_path: Path) -> None:
    run(tmp_path / "run")
    assert run(tmp_path / "run", trace=tmp_path / "t.json").was_finished
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": "low,fast"}, "streams: 'fast' is unknown; give any of load,low,high, or none"),
        ({"streams": "low,low"}, "streams: 'low' is named twice"),
        ({"trace": "/absent/t.json"}, "trace: there is no folder /absent; make it, or choose another"),
        ({"trace": "/tmp"}, "trace: /tmp is a folder; give the name of a file"),
        ({"policy": "pahq", "dtype": "float64"}, "but the model is in float64; use --dtype float32"),
        ({"policy": "linear=tf32"}, "format 'tf32': cpu has no TF32"),
        ({"policy": "values:linear=bf16", "exact": True}, "exact: policy .* rounds values"),
        ({"exact": True}, "exact: policy 'fp32' is FP32 throughout"),
        ({"under_test": "both"}, "under_test 'both': policy 'fp32' has no other precision"),
    ],
)
def test_impossible_wishes_leave_no_folder(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PahqError, match=message):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
