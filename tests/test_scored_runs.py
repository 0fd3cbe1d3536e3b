"""Runs of methods that score edges: selection, files, resume, and the same scores in every process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import pahq
import scored_runs
from pahq import scoring
from pahq.errors import PahqError
from pahq.evaluation import faithfulness
from pahq.evaluation.circuit import Circuit
from pahq.evaluation.examples import Examples
from pahq.graph import Graph
from pahq.method.base import Scores
from pahq.method.random import uniform
from pahq.method.registry import METHODS as REGISTRY
from pahq.method.registry import get_method
from pahq.method.select import above, beyond, greedy, top
from pahq.report import config as config_module
from pahq.report import state, summary
from pahq.report.config import RunConfig
from pahq.report.progress import PlainWatch
from pahq.report.state import SCORES_FILE, STATE_FILE, FolderWork
from pahq.report.steps import Steps
from scored_runs import DOUBLE, METHODS, config, run
from tiny import RandomTask, transformer

FILES = ("circuit.safetensors", SCORES_FILE)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Examples in pieces, every state kept, the tests' own method beside the others, one thread."""
    scored_runs.in_pieces(monkeypatch)
    monkeypatch.setattr(state, "SHARE", float("inf"))
    monkeypatch.setattr(config_module, "CHOICES", dict(config_module.CHOICES))
    monkeypatch.setitem(REGISTRY, DOUBLE, REGISTRY["random"])
    scored_runs.add_double()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> list[int]:
    """Has the process end (by an exception) right after so many states were kept; -> a list with that many places."""
    save, count = FolderWork.save, [0]

    def counting(self: FolderWork, tensors: Any, facts: Any) -> None:
        save(self, tensors, facts)
        count[0] += 1
        if count[0] == saves:
            raise Interrupted

    monkeypatch.setattr(FolderWork, "save", counting)
    return count


@pytest.mark.parametrize("method", [*METHODS, DOUBLE])
def test_a_run_cut_at_any_kept_state_ends_in_the_same_files(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        count = interrupt_after(patch, 0)
        whole = run(tmp_path / "whole", config(method))
    saves = count[0]
    assert whole.circuit.n_edges > 0
    assert not (tmp_path / "whole" / STATE_FILE).exists()
    if method != "random":  # which takes no time
        assert saves >= 2, "nothing is kept of what a killed run did"
    for number in sorted({1, saves // 3, saves // 2, saves - 1, saves}):
        if not 1 <= number <= saves:
            continue
        folder = tmp_path / f"cut{number}"
        with monkeypatch.context() as patch:
            interrupt_after(patch, number)
            with pytest.raises(Interrupted):
                run(folder, config(method))
        assert (folder / STATE_FILE).exists()
        with monkeypatch.context() as patch:
            count = interrupt_after(patch, 0)
            run(folder, config(method))
        assert (folder / FILES[0]).read_bytes() == (tmp_path / "whole" / FILES[0]).read_bytes(), number
        assert json.loads((folder / "run.json").read_text())["search"]["resumes"] == 1
        assert count[0] < saves, "the run began anew"


def test_a_run_cut_after_its_scores_does_not_score_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "run", config(DOUBLE))
    before = contents(tmp_path / "run")
    for name in ("run.json", "circuit.json", "circuit.safetensors"):
        (tmp_path / "run" / name).unlink()

    def again(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(scored_runs, "double_scores", again)
    scored_runs.add_double()
    outcome = run(tmp_path / "run", config(DOUBLE))
    assert contents(tmp_path / "run") == before
    assert outcome.record["search"]["notes"] == ["made up"]


@pytest.mark.parametrize("file", [STATE_FILE, SCORES_FILE])
@pytest.mark.parametrize("content", [b"", b"nonsense", "circuit", "other"])
def test_damaged_files_are_said(file: str, content: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, config(DOUBLE))
    if content == "circuit":
        content = (folder / "circuit.safetensors").read_bytes()
    elif content == "other":
        run(tmp_path / "other", config("random"))
        content = (tmp_path / "other" / SCORES_FILE).read_bytes()
    for name in ("run.json", SCORES_FILE):
        (folder / name).unlink()
    (folder / file).write_bytes(content)
    with pytest.raises(PahqError, match=str(folder / file)):
        run(folder, config(DOUBLE))


def test_files_and_record(tmp_path: Path) -> None:
    outcome = run(tmp_path / "run", config(DOUBLE, select="greedy"))
    loaded, record = Circuit.load(tmp_path / "run"), outcome.record
    graph = loaded.graph
    assert np.array_equal(np.isnan(loaded.effects), ~graph.edges)
    assert (loaded.order == -1).all()
    assert np.array_equal(loaded.mask, greedy(graph, loaded.effects, 60))
    assert 50 < loaded.n_edges <= 60
    scores, _ = state.load_scores(tmp_path / "run", graph, DOUBLE) or (None, None)
    assert scores is not None
    assert np.array_equal(scores.values[graph.edges], loaded.effects[graph.edges])
    search = record["search"]
    assert search["selection"] == {"rule": "greedy", "edges": 60, "threshold": None, "selected": loaded.n_edges}
    assert search["stats"] == {"passes": 40}
    assert search["passes"] == 40
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == record
    figures = loaded.metadata["figures"]
    assert figures["final_metric"] == figures["validation"]["circuit"]["metric"]
    text = io.StringIO()
    summary.show(loaded, record, Console(file=text, width=200))
    for word in ("double", "greedy 60 edges", "all edges scored", "note: made up", "passes 40", "peak memory"):
        assert word in text.getvalue()
    assert summary.as_json(loaded, record)["search"] == search


def test_ways_to_select() -> None:
    scores = run(None, config(DOUBLE, edges=1)).circuit.effects
    graph = transformer(layers=2)
    assert graph is not None
    for more, expected in (
        ({"edges": 33}, lambda g: top(g, scores, 33)),
        ({"edges": 33, "absolute": True}, lambda g: top(g, scores, 33, True)),
        ({"edges": None, "threshold": 2.0}, lambda g: above(g, scores, 2.0)),
        ({"edges": None, "threshold": 2.0, "absolute": True}, lambda g: above(g, scores, 2.0, True)),
        ({"edges": 33, "select": "greedy"}, lambda g: greedy(g, scores, 33)),
    ):
        circuit = run(None, config(DOUBLE, **more)).circuit
        assert np.array_equal(circuit.mask, expected(circuit.graph)), more
    own = run(None, config(DOUBLE, edges=None, method_options={"natural": 3.0}))
    assert np.array_equal(own.circuit.mask, above(own.circuit.graph, scores, 3.0))
    assert own.record["search"]["selection"]["threshold"] == 3.0


@pytest.mark.parametrize("method", [name for name in METHODS if get_method(name).natural])
def test_methods_with_a_threshold_of_their_own(method: str) -> None:
    outcome = run(None, config(method, edges=None))
    circuit, found = outcome.circuit, outcome.record["search"]
    assert found["natural"] is not None
    assert np.array_equal(circuit.mask, above(circuit.graph, circuit.effects, found["natural"]))


def test_an_empty_circuit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(None, config(DOUBLE, edges=None, threshold=1e9), watch=PlainWatch(sys.stderr))
    assert outcome.circuit.n_edges == 0
    assert "the circuit is empty" in capsys.readouterr().err
    assert "the circuit is empty" in outcome.record["search"]["notes"][-1]


def test_a_circuit_much_smaller_than_asked_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the embeddings' edges come last, the best edges make no path, until all of a sudden many do."""
    graph = run(None, config(DOUBLE)).circuit.graph
    values = np.where(graph.edges, 2.0, 0.0)
    values[graph.edges[:, 0], 0] = 1.0

    def late(problem: Any, *_: Any) -> Scores:
        return Scores(problem.graph, values, DOUBLE)

    monkeypatch.setattr(scored_runs, "double_scores", late)
    scored_runs.add_double()
    outcome = run(None, config(DOUBLE, edges=5))
    (note,) = outcome.record["search"]["notes"]
    larger = beyond(graph, values, "top", 5)
    assert larger is not None
    assert note.startswith("no edge was kept: of whole paths ")
    assert f"the next larger circuit has {larger} edges; ask for so many" in note
    assert "or absolute" in note
    assert run(None, config(DOUBLE, edges=larger)).circuit.n_edges == larger


def test_progress_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pahq.report.steps.PLAIN_INTERVAL", 0.0)
    text = io.StringIO()
    run(None, config(DOUBLE), watch=PlainWatch(text))
    assert "39 of 40: double, about 0:0" in text.getvalue()


def test_state_is_not_written_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SHARE", 1e-9)
    work = FolderWork(tmp_path, "test", Steps(PlainWatch(io.StringIO())))
    for step in range(5):
        work.save({"x": torch.tensor([step])}, {"step": step})
    kept = work.load()
    assert kept is not None
    assert kept[1] == {"step": 0}


def test_seed_counts_and_repeats() -> None:
    one, two, again = (run(None, config("random", seed=seed)).circuit.effects for seed in (0, 1, 0))
    assert np.array_equal(one, again, equal_nan=True)
    assert not np.array_equal(one, two, equal_nan=True)


def test_prefiltered_runs_report_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = RunConfig(
        "object:Transformer",
        "object:random",
        0.002,
        metric="logit_diff",
        n=4,
        prefilter=DOUBLE,
        keep=0.4,
        order_by_score=True,
    )
    whole = run(tmp_path / "whole", of)
    filtered, graph = whole.record["prefilter"], whole.circuit.graph
    scores, _ = state.load_scores(tmp_path / "whole", graph, DOUBLE) or (None, None)
    assert scores is not None
    left = top(graph, scores.values, round(0.4 * graph.n_edges))
    assert filtered["edges_left"] == left.sum()
    assert filtered["share_filtered"] == pytest.approx(1 - left.sum() / graph.n_edges)
    assert not (whole.circuit.mask & ~left).any()
    tested = whole.circuit.order >= 0
    assert tested.any()
    assert not (tested & ~left).any()
    for row in range(graph.shape[0]):  # from the least score up
        columns = np.flatnonzero(tested[row, : graph.direct])
        by_order = columns[np.argsort(whole.circuit.order[row, columns])]
        assert (np.diff(scores.values[row, by_order]) >= 0).all()
    parts = filtered["figures"]
    names = ("circuit", "corrupted", "full")
    circuit, corrupted, full = (parts[name]["metric"] for name in names)
    assert filtered["metric"] == circuit
    assert filtered["faithfulness"] == pytest.approx((circuit - corrupted) / (full - corrupted))
    text = io.StringIO()
    summary.show(whole.circuit, whole.record, Console(file=text, width=200))
    assert "prefilter double: " in text.getvalue()
    assert summary.as_json(whole.circuit, whole.record)["prefilter"] == filtered

    with monkeypatch.context() as patch:
        interrupt_after(patch, 17)
        with pytest.raises(Interrupted):
            run(tmp_path / "cut", of)
    run(tmp_path / "cut", of)
    assert contents(tmp_path / "cut")[0] == contents(tmp_path / "whole")[0]
    (tmp_path / "cut" / "run.json").unlink()
    lines = (tmp_path / "cut" / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "journal.jsonl").write_text("".join(lines[: len(lines) // 2]))
    run(tmp_path / "cut", of)
    assert contents(tmp_path / "cut")[0] == contents(tmp_path / "whole")[0]


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_the_cost_of_a_prefilter_is_what_evaluations_call_recovered(ablation: str) -> None:
    """So that 0 is a circuit without edges, whatever takes their place."""
    of = RunConfig(
        "object:Transformer",
        "object:random",
        0.002,
        metric="logit_diff",
        n=4,
        ablation=ablation,
        prefilter="random",
        keep=0.4,
    )
    found = run(None, of).record["prefilter"]
    model, task = transformer(layers=2), RandomTask(default_metric="logit_diff")
    graph, prompts = Graph(model.config), task.prompts(model, 4)
    examples = Examples(model, prompts, graph, task, "logit_diff", ablation)
    left = top(graph, uniform(graph, 0).values, round(0.4 * graph.n_edges))
    assert found["edges_left"] == left.sum()
    assert found["faithfulness"] == pytest.approx(faithfulness.row(examples, examples.figures(left))["recovered"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"edges": 0}, "edges: 0 is no number of edges"),
        ({"edges": 2.5}, "edges: 2.5 is no number of edges"),
        ({"edges": 10**6}, "edges: 1000000 lies outside"),
        ({"threshold": 0.1}, "edges: 60 and threshold 0.1 exclude each other"),
        ({"edges": None}, "edges: method random sets no threshold of its own; give edges, such as 200, or threshold"),
        ({"edges": None, "select": "top"}, "select: 'top' takes a number of edges"),
        ({"select": "threshold"}, "select: 'threshold' takes no number of edges"),
        ({"select": "best"}, "select: 'best' is unknown"),
        ({"check": True}, "check: True goes with method acdc alone; leave it out with random"),
        ({"exact": False}, "exact: False goes with method acdc alone"),
        ({"head_order": "ascending"}, "head_order: 'ascending' goes with method acdc alone"),
        ({"full_vocabulary": True}, "full_vocabulary: True goes with"),
        ({"prefilter": "eap", "keep": 0.5}, "prefilter: 'eap' goes with method acdc alone"),
        ({"method_options": {"steps": 3}}, "method 'random': option 'steps' is unknown; it has none"),
        (
            {"method": "information-flow", "edges": None, "method_options": {"tau": 0.2}},
            "edges: method information-flow sets no threshold of its own without tau above 0 and combine other than "
            "flow; give edges, such as 200, or threshold",
        ),
        (
            {"method": "information-flow", "edges": None, "method_options": {"tau": 0, "combine": "local"}},
            "edges: method information-flow sets no threshold of its own",
        ),
    ],
)
def test_impossible_requests_of_scoring_runs(more: dict[str, Any], message: str) -> None:
    with pytest.raises(PahqError) as error:
        run(None, config(**{"method": "random"} | more))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"threshold": None}, "threshold: method acdc needs one"),
        ({"edges": 5}, "edges: 5 goes with methods that score edges; leave it out with acdc"),
        ({"select": "top"}, "select: 'top' goes with methods that score edges"),
        ({"keep": 0.5}, "keep: 0.5 goes with prefilter"),
        ({"order_by_score": True}, "order_by_score: True goes with prefilter"),
        ({"method_options": {"steps": 3}}, "goes with prefilter"),
        ({"prefilter": "eap"}, "keep: prefilter needs the share of edges to keep"),
        ({"prefilter": "eap", "keep": 1.5}, "keep: 1.5 is no share of the edges"),
        ({"prefilter": "eap", "keep": 0.0}, "keep: 0.0 is no share of the edges"),
        ({"prefilter": "acdc", "keep": 0.5}, "prefilter: 'acdc' is unknown"),
        ({"prefilter": "eap", "keep": 0.5, "method_options": {"steps": 1}}, "method 'eap': option 'steps' is unknown"),
        ({"prefilter": "eap", "keep": 0.5, "policy": "rtn"}, "prefilter: policy 'rtn' rounds values"),
    ],
)
def test_impossible_requests_of_sweeps(more: dict[str, Any], message: str) -> None:
    with pytest.raises(PahqError) as error:
        run(None, RunConfig(**{"model": "object:T", "task": "object:random", "threshold": 0.1, "n": 4} | more))
    assert message in str(error.value)


def test_a_prefilter_that_leaves_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "top", lambda graph, *_: np.zeros(graph.shape, dtype=bool))
    of = RunConfig("object:T", "object:random", 0.1, n=4, metric="kl_div", prefilter="random", keep=0.01)
    with pytest.raises(PahqError, match=r"keep: no path from the embeddings to the logits lies within 0\.01 of"):
        run(None, of)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps 0: give at least 1"),
        ({"steps": "many"}, "method 'double': option steps is 'many'; give a value of type int"),
        ({"steps": True}, "option steps is True"),
        ({"pause": "x"}, "option pause is 'x'; give a value of type float"),
        ({"natural": "x"}, "option natural is 'x'; give a value of type float or none"),
        ({"pace": 1}, "method 'double': option 'pace' is unknown; it has steps, pause, natural, kinds"),
    ],
)
def test_options_of_a_method_are_judged(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PahqError) as error:
        get_method(DOUBLE).options(given)
    assert message in str(error.value)


def test_options_of_a_method_are_fitted() -> None:
    options = get_method(DOUBLE).options({"pause": 1, "natural": "none", "kinds": "x,y"})
    assert options == scored_runs.DoubleOptions(pause=1.0, natural=None, kinds=("x", "y"))
    assert type(options.pause) is float


def test_streams_go_with_sweeps_alone(tmp_path: Path) -> None:
    with pytest.raises(PahqError, match="streams: 'none' goes with method acdc alone"):
        run(None, config("random"), streams="none")
    with pytest.raises(PahqError, match=r"trace: .* goes with method acdc alone"):
        run(None, config("random"), trace=tmp_path / "t.json")


def test_older_records_can_still_be_read() -> None:
    new = ("edges", "select", "method_options", "prefilter", "keep", "order_by_score")
    now = RunConfig("m", "t", 0.1)
    old = {name: value for name, value in now.to_dict().items() if name not in new}
    assert RunConfig.from_dict(old, "start.json") == now


def test_from_python(tmp_path: Path) -> None:
    task = RandomTask()
    circuit = pahq.discover(transformer(layers=2), task, method="random", edges=40, n=2, out=tmp_path / "run")
    assert 0 < circuit.n_edges <= 40
    assert circuit.metadata["config"]["method"] == "random"
    command = json.loads((tmp_path / "run" / "run.json").read_text())["command"]
    assert "method='random'" in command
    assert "edges=40" in command


def test_scores_do_not_depend_on_the_hash_seed() -> None:
    """Nor on anything else that differs between processes."""
    script = Path(__file__).parent / "scored_runs.py"
    found = []
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        )
        for seed in ("0", "1", "4242")
    ]
    for process in processes:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        found.append(json.loads(out))
    assert set(found[0]) == set(METHODS)
    assert found[0] == found[1] == found[2]
