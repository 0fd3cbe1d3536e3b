"""A folder that holds a circuit without a run: what needs no more than a circuit takes it, the rest says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import figure_files
from commands import Pahq
from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.report.finished import FinishedRun, circuit_in, finished_run
from pahq.report.viewer.page import read_page


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, and ``back``: the circuit of ``tight`` as it came back from EAP-IG's format."""
    from pahq.report.interchange import convert

    folder = figure_files.make(tmp_path_factory.mktemp("files"))
    convert(folder / "tight", folder / "tight.json", write_as="eap-ig")
    convert(folder / "tight.json", folder / "back", graph=Circuit.load(folder / "tight").graph)
    return folder


def test_show(pahq: Pahq, files: Path) -> None:
    circuit = Circuit.load(files / "back")
    answer = pahq("show", files / "back")
    assert answer.code == 0, answer.err
    assert "a circuit without a run" in answer.out
    assert f"kept {circuit.n_edges:,} of" in answer.out
    record = json.loads(pahq("show", files / "back", "--json").out)
    assert set(record) == {"run", "size", "largest_edges"}
    assert [edge["sender"] for edge in record["largest_edges"]] == [edge.sender for edge in circuit.largest()]


def test_view(pahq: Pahq, files: Path) -> None:
    silent = pahq("view", files / "back", "--no-model")
    assert (silent.code, silent.err) == (0, "")
    page = read_page(files / "back" / "viewer.html")
    assert page is not None
    assert page["evidence"] is None
    assert "a circuit but no run" in page["missing"]
    assert page["size"]["addition"] == Circuit.load(files / "back").n_addition
    told = pahq("view", files / "back")
    assert told.code == 0
    assert "note: no attention patterns and words: the folder holds a circuit but no run" in told.err


def test_over_another(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    tight, back = Circuit.load(files / "tight"), Circuit.load(files / "back")
    shared = int((tight.mask & back.mask).sum())
    page = tmp_path / "page.html"
    for over, under in (("tight", "back"), ("back", "tight")):
        words = (files / over, "--against", files / under, "--out")
        assert pahq("view", *words, page, "--no-model").code == 0
        found = read_page(page)
        assert found is not None
        assert found["graph"]["overlay"]["name"] == under
        assert pahq("plot", "graph", *words, tmp_path / "x.svg").code == 0
        rows = (tmp_path / "x.csv").read_text().splitlines()[1:]
        assert sum("both" in row for row in rows) == shared > 0


def test_plot_graph(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    answer = pahq("plot", "graph", files / "back", "--out", tmp_path / "x.svg", "--json")
    assert json.loads(answer.out)["rows"] == Circuit.load(files / "back").n_edges
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")


def test_evaluate_against(files: Path) -> None:
    from pahq.report.references import other_run, reference_of

    run = finished_run(files / "tight")
    found = reference_of(run, None, other_run(None, files / "back"))
    assert found is not None
    assert np.array_equal(found.mask, Circuit.load(files / "back").mask)
    assert isinstance(circuit_in(files / "tight"), FinishedRun)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "{files}/back"], "it holds a circuit but no run (run.json is missing); give it as --against"),
        (["compare", "{files}/tight", "{files}/back"], "or open it with Circuit.load"),
        (["plot", "timeline", "{files}/back", "--out", "x.svg"], "back holds a circuit but no run; give the folder of"),
        (["plot", "cost", "{files}/tight", "{files}/back", "--out", "x.svg"], "back holds a circuit but no run; give"),
        (["plot", "roc", "{files}/back", "--out", "x.svg"], "back holds a circuit but no run; name runs alone"),
    ],
)
def test_what_needs_the_run_says_so(pahq: Pahq, files: Path, words: list[str], said: str) -> None:
    assert said in pahq(*(word.format(files=files) for word in words)).error


def test_a_run_that_is_not_finished_stays_one(files: Path, tmp_path: Path) -> None:
    Circuit.load(files / "back").save(tmp_path)
    (tmp_path / "start.json").write_text("{}")
    for take in (circuit_in, finished_run):
        with pytest.raises(PahqError, match="pahq resume"):
            take(tmp_path)
