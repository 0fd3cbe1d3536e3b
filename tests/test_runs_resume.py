"""Whole runs from Python: the same circuit whether it was found in one go, in pieces, or without a folder."""

from __future__ import annotations

import io
import json
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console

import pahq
from pahq.api import execute, resume
from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.method import acdc
from pahq.report import machine, summary
from pahq.report.config import RunConfig
from pahq.report.journal import JOURNAL_FILE
from pahq.report.progress import LiveWatch, PlainWatch, Watch, as_time, watch_for
from tiny import RandomTask, transformer

CONFIG = RunConfig("object:Transformer", "object:random", 0.0005, metric="kl_div", n=4)
FILES = ["circuit.json", "circuit.safetensors", "run.json", "start.json", "journal.jsonl"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many checkpoints in a small run, and no time spent on measuring the machine."""
    monkeypatch.setattr(acdc, "CHECKPOINT_TESTS", 40)
    monkeypatch.setattr(machine, "gemm_peak", lambda *_: 1e11)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(out: Path | None, config: RunConfig = CONFIG, watch: Watch | None = None) -> Any:
    return execute(config, out, model=transformer(), task=RandomTask(), watch=watch)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def same(one: Circuit, other: Circuit) -> bool:
    return all(getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in ("mask", "effects", "order"))


def test_a_run_cut_anywhere_ends_in_the_same_circuit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole").circuit
    assert whole.n_tested > 200
    assert 0 < whole.n_edges < whole.graph.n_edges
    data = (tmp_path / "whole" / JOURNAL_FILE).read_bytes()
    assert data.count(b'"checkpoint": true') >= 3
    draw = random.Random(0)
    for at in [0, 1, *(draw.randrange(len(data)) for _ in range(10)), len(data)]:
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        (tmp_path / "cut").mkdir()
        shutil.copy(tmp_path / "whole" / "start.json", tmp_path / "cut")
        (tmp_path / "cut" / JOURNAL_FILE).write_bytes(data[:at])
        resumed = run(tmp_path / "cut")
        assert not resumed.was_finished
        assert same(resumed.circuit, whole), at
        assert resumed.record["search"]["tests"] == whole.n_tested
        assert resumed.record["search"]["resumes"] == 1


def test_without_a_folder_the_circuit_is_the_same(tmp_path: Path) -> None:
    assert same(pahq.discover(transformer(), RandomTask(), 0.0005, n=4), run(tmp_path / "run").circuit)


def test_the_files_hold_the_circuit_and_its_record(tmp_path: Path) -> None:
    outcome = run(tmp_path / "run")
    assert same(Circuit.load(tmp_path / "run"), outcome.circuit)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record == outcome.record
    assert record["config"] == CONFIG.to_dict()
    assert record["precision"]["policy"]["name"] == "fp32"
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == 1
    assert record["command"].startswith("pahq.discover(model='object:Transformer', task='object:random'")
    search = record["search"]
    assert search["states"] >= search["tests"] == outcome.circuit.n_tested
    assert search["states"] - search["wasted"] == search["tests"]
    assert search["flops_total"] == sum(search["flops"].values()) > 0
    assert 0 < search["share_of_peak"] < 1
    assert record["peak_memory"]["host_bytes"] > 2**24
    facts = json.loads((tmp_path / "run" / "circuit.json").read_text())
    assert facts["size"]["tested"] == search["tests"]
    assert len(facts["edges"]) == outcome.circuit.n_edges
    lines = (tmp_path / "run" / JOURNAL_FILE).read_text().splitlines()
    decisions = [fact for fact in map(json.loads, lines) if "order" in fact]
    assert [fact["order"] for fact in decisions] == list(range(search["tests"]))
    for fact in decisions:  # floats come back exactly
        place = outcome.circuit.graph.edge(fact["edge"])
        assert outcome.circuit.effects[place] == fact["after"] - fact["before"]
        assert outcome.circuit.mask[place] == fact["kept"]


def test_figures_of_the_circuit_are_those_of_the_search(tmp_path: Path) -> None:
    figures = run(None).circuit.metadata["figures"]
    assert figures["validation"]["prompts"] == figures["test"]["prompts"] == 4
    assert figures["validation"]["full"]["metric"] == pytest.approx(0, abs=1e-6)
    assert figures["validation"]["circuit"]["metric"] == pytest.approx(figures["final_metric"], abs=1e-5)
    assert figures["validation"]["corrupted"]["metric"] > 0.01
    assert figures["test"] != figures["validation"]


def test_too_few_test_prompts_are_said_not_hidden() -> None:
    outcome = execute(CONFIG, None, model=transformer(), task=RandomTask(limit=2))
    assert "split 'test' has 2" in outcome.circuit.metadata["figures"]["test"]["missing"]
    console = Console(file=io.StringIO(), width=200)
    summary.show(outcome.circuit, outcome.record, console)
    assert isinstance(console.file, io.StringIO)
    assert "split 'test' has 2" in console.file.getvalue()


def test_a_finished_run_is_not_touched(tmp_path: Path) -> None:
    first = run(tmp_path / "run")
    before = contents(tmp_path / "run")
    second = run(tmp_path / "run")
    assert second.was_finished
    assert same(first.circuit, second.circuit)
    assert second.record == first.record
    assert contents(tmp_path / "run") == before


def test_another_run_is_refused_and_nothing_lost(tmp_path: Path) -> None:
    run(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(PahqError, match=r"another run .threshold is 0.0005 there, 0.1 here"):
        run(tmp_path / "run", replace(CONFIG, threshold=0.1))
    assert contents(tmp_path / "run") == before


def test_other_weights_or_prompts_are_refused_on_resuming(tmp_path: Path) -> None:
    run(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(PahqError, match="the weights are no longer those this run began with"):
        execute(CONFIG, tmp_path / "run", model=transformer(seed=1), task=RandomTask())

    class Other(RandomTask):
        def prompts(self, model: Any, n: int, seed: int = 0, split: str = "validation") -> Any:
            return super().prompts(model, n, seed + 1, split)

    with pytest.raises(PahqError, match="the prompts are no longer those this run began with"):
        execute(CONFIG, tmp_path / "run", model=transformer(), task=Other())


def test_a_journal_of_another_graph_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    file = tmp_path / "run" / JOURNAL_FILE
    text = file.read_text()
    for old, new in (('"row": 52,', '"row": 5200,'), ('"column": 20,', '"column": 19,')):
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(PahqError, match=r"decision 0 is .*damaged"):
            run(tmp_path / "run")


def test_objects_cannot_be_resumed_by_name(tmp_path: Path) -> None:
    run(tmp_path / "run")
    with pytest.raises(PahqError, match="started from Python with a Transformer object"):
        resume(tmp_path / "run")
    with pytest.raises(PahqError, match="no such folder"):
        resume(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PahqError, match="not the folder of a run"):
        resume(tmp_path / "empty")


def test_a_metric_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cause is passed on, and what was decided before stays in the journal."""
    evaluate = acdc.Engine.evaluate
    calls = iter(range(100))

    def broken(self: Any, batch: Any) -> Any:
        if next(calls) == 5:
            raise PahqError("metric 'kl_div' is nan")
        return evaluate(self, batch)

    monkeypatch.setattr(acdc.Engine, "evaluate", broken)
    with pytest.raises(PahqError, match="kl_div' is nan"):
        run(tmp_path / "run")
    assert (tmp_path / "run" / JOURNAL_FILE).read_text().count('"order"') > 0
    monkeypatch.undo()
    assert not (tmp_path / "run" / "run.json").exists()


def test_bad_arguments_from_python() -> None:
    for name, hint in (
        ("treshold", r"did you mean 'threshold'\?"),
        ("progres", r"did you mean 'progress'\?"),
        ("metrics", r"did you mean 'metric'\?"),
        ("options", r"did you mean 'task_options'\?"),
        ("qqq", r"see help\(pahq\.discover\)"),
    ):
        with pytest.raises(PahqError, match=rf"^discover: '{name}' is unknown; {hint}$"):
            pahq.discover(transformer(), RandomTask(), 0.1, **cast(dict[str, Any], {name: 1}))
    with pytest.raises(PahqError, match="metric 'accuracy' is unknown"):
        pahq.discover(transformer(), RandomTask(), 0.1, metric="accuracy")
    with pytest.raises(PahqError, match="fold_ln: the model is loaded already"):
        pahq.discover(transformer(), RandomTask(), 0.1, fold_ln=True)
    with pytest.raises(PahqError, match="fold_value_biases: the model is loaded already"):
        pahq.discover(transformer(), RandomTask(), 0.1, fold_value_biases=True)
    with pytest.raises(PahqError, match="device: 'warp' cannot be used"):
        pahq.discover(transformer(), RandomTask(), 0.1, device="warp")
    with pytest.raises(PahqError, match="threshold: nan"):
        pahq.discover(transformer(), RandomTask(), math.nan)


def test_plain_watch_prints_a_line_now_and_then() -> None:
    stream = io.StringIO()
    watch = watch_for(stream)
    assert isinstance(watch, PlainWatch)
    run(None, watch=watch)
    assert stream.getvalue().splitlines() == ["measuring the circuit …"]
    stream = io.StringIO()
    run(None, watch=PlainWatch(stream, interval=0))
    lines = stream.getvalue().splitlines()
    assert len(lines) > 5
    assert all("edges tested" in line and "kept" in line and "left" in line for line in lines[:-1])
    assert type(watch_for(stream, quiet=True)) is Watch


def test_live_watch_shows_edges_metric_and_time() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    watch = watch_for(stream)
    assert isinstance(watch, LiveWatch)
    watch.console = Console(file=stream, force_terminal=True, width=120)
    run(None, watch=watch)
    shown = stream.getvalue()
    for word in ("tested", "kept", "kl_div", "left", "measuring"):
        assert word in shown


def test_time_is_written_as_people_write_it() -> None:
    assert [as_time(s) for s in (None, 0.4, 59.6, 90, 3725)] == ["-:--", "0:00", "1:00", "1:30", "1:02:05"]
