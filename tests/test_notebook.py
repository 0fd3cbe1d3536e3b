"""Circuits and progress in a notebook: tables say what a circuit holds, text stays text, bars need no extras."""

from __future__ import annotations

import io
import sys
import types
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import toys
from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.method.acdc import Progress
from pahq.report.notebook import NotebookWatch
from pahq.report.progress import LiveWatch, PlainWatch, Watch, watch_for
from pahq.report.steps import Steps


class Cells(HTMLParser):
    """Texts of a table's cells row by row, and all tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def circuit() -> Circuit:
    graph = toys.graph(groups=1)
    draw = np.random.default_rng(0)
    tested = graph.edges & (draw.random(graph.shape) < 0.8)
    mask = graph.edges & (draw.random(graph.shape) < 0.4)
    effects = np.where(tested, draw.standard_normal(graph.shape), np.nan)
    order = np.where(tested, draw.permutation(mask.size).reshape(graph.shape), -1)
    return Circuit(graph, mask, effects, order)


def test_a_circuit_shows_itself() -> None:
    one = circuit()
    rows = Cells(one._repr_html_()).rows
    total = next(row for row in rows if row[0] == "all")
    assert total[1:] == [f"{one.n_addition} of {one.graph.n_addition}", f"{one.n_direct} of {one.graph.n_direct}"]
    parts = [row for row in rows if row[0].startswith("into ")]
    for column, whole in ((1, one.n_addition), (2, one.n_direct)):
        assert sum(int(row[column].split()[0]) for row in parts if row[column] != "–") == whole
    first = one.largest(1)[0]
    assert [f"{first.sender} → {first.receiver}", f"{first.effect:.4g}", str(first.order)] in rows
    assert len(one._repr_html_()) < 10_000


def test_text_in_a_summary_stays_text() -> None:
    evil = "</td><script>alert(1)</script><img src=x onerror=alert(2)>"
    one = circuit()
    one.metadata["config"] = {"task": evil, "metric": evil, "model": evil}
    object.__setattr__(one.graph.config, "name", evil)
    page = Cells(one._repr_html_())
    assert page.tags == {"div", "strong", "table", "tr", "td", "th"}
    assert evil.replace("<", "&lt;").replace(">", "&gt;") in one._repr_html_()


def test_a_circuit_without_effects_shows_itself() -> None:
    graph = toys.graph(direct_edges=False)
    empty = toys.circuit(graph, graph.edges & False, np.full(graph.shape, np.nan))
    rows = Cells(empty._repr_html_()).rows
    assert ["all", f"0 of {graph.n_addition}", "–"] in rows
    assert not any(row[0] == "largest effects" for row in rows)


def test_table_of_edges() -> None:
    pytest.importorskip("pandas")
    one = circuit()
    kept = one.to_dataframe()
    edges = one.edges()
    assert len(kept) == len(edges) == one.n_edges
    assert kept["kept"].all()
    want = {(edge.sender, edge.receiver): edge for edge in edges}
    for row in kept.to_dict("records"):
        edge = want.pop((row["sender"], row["receiver"]))
        np.testing.assert_equal((row["effect"], row["order"]), (edge.effect, edge.order))
        assert row["kind"] == ("direct" if edge.sender == "direct" else "addition")
        assert row["receiver"].endswith(row["input"]) or row["input"] == "mlp"
    assert not want
    tested = one.to_dataframe("tested")
    assert len(tested) == one.n_tested
    assert tested["order"].is_monotonic_increasing
    everything = one.to_dataframe("all")
    assert len(everything) == one.graph.n_edges
    assert (everything["order"].iloc[: one.n_tested] == tested["order"]).all()
    with pytest.raises(PahqError, match="rows 'some' is unknown"):
        one.to_dataframe("some")


def test_a_missing_pandas_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(PahqError, match=r"pip install 'pahq\[notebook\]'"):
        circuit().to_dataframe()


class FakeHandle:
    """What IPython gives for an output that can be replaced."""

    def __init__(self, shown: list[Any]) -> None:
        self.shown = shown

    def update(self, what: Any) -> None:
        self.shown[-1] = what


def in_a_notebook(monkeypatch: pytest.MonkeyPatch, kernel: bool = True) -> list[Any]:
    """Stands in for IPython; returns what is on display."""
    shown: list[Any] = []

    def display(what: Any, display_id: bool = False) -> FakeHandle:
        assert display_id
        shown.append(what)
        return FakeHandle(shown)

    shell = types.SimpleNamespace(kernel=object()) if kernel else types.SimpleNamespace()
    top, part = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    top.get_ipython = lambda: shell  # pyright: ignore[reportAttributeAccessIssue]  (a stand-in)
    part.display, part.HTML = display, lambda data: data  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "IPython", top)
    monkeypatch.setitem(sys.modules, "IPython.display", part)
    return shown


def progress(tested: int, left: int) -> Progress:
    return Progress(decisions=[], tested=tested, kept=tested // 2, metric=0.25, edges_left=left, states=0, wasted=0)


def test_a_notebook_has_one_bar_that_moves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = in_a_notebook(monkeypatch)
    monkeypatch.setattr("pahq.report.notebook.NOTEBOOK_INTERVAL", 0.0)
    watch = watch_for()
    assert isinstance(watch, NotebookWatch)
    watch.say("loading a model …")
    watch.begin("kl_div <b>", 0)
    for tested in (10, 20, 30):
        watch.update(progress(tested, 90 - tested))
    assert len(shown) == 1
    assert 'max="90" value="30"' in shown[0]
    assert "30 edges tested, 15 kept, kl_div &lt;b&gt; 0.2500" in shown[0]
    watch.end()
    assert len(shown) == 1
    assert capsys.readouterr().err == "loading a model …\n"


def test_a_bar_is_not_redrawn_for_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = in_a_notebook(monkeypatch)
    watch = watch_for()
    watch.begin("kl_div")
    first = list(shown)
    for tested in range(1, 50):
        watch.update(progress(tested, 100))
    assert shown == first
    watch.end()  # the last state is what stays
    assert 'value="49"' in shown[0]


def test_steps_have_a_bar_too(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = in_a_notebook(monkeypatch)
    steps = Steps(watch_for())
    for done in range(1, 8):
        steps.step("scores <1>", done, 7)
    steps.end()
    assert shown == ['<progress max="7" value="7"></progress> 7 of 7: scores &lt;1&gt;']


def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_notebook(monkeypatch, kernel=False)  # IPython on a terminal
    assert type(watch_for(io.StringIO())) is PlainWatch
    assert type(watch_for()) in (PlainWatch, LiveWatch)
    in_a_notebook(monkeypatch)
    assert type(watch_for(io.StringIO())) is PlainWatch
    assert type(watch_for(quiet=True)) is Watch
