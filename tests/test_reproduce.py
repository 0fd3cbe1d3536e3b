"""``pahq reproduce`` on stand-ins: its figures; it goes on where it was; a failing cell stops no other."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import Pahq
from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.evaluation.roc import auc, rates
from pahq.evaluation.truth.base import load_truth
from pahq.report.progress import Watch
from pahq.reproduction import cells as cells_module
from pahq.reproduction import paper
from pahq.reproduction.auc import PAPER_ROWS, ROWS, curve
from pahq.reproduction.cells import RUNS, Cell, Grid, Setting, on_truth
from pahq.reproduction.settings import GridOptions
from pahq.reproduction.tables import table_runtime
from tiny import save_model, save_prompts

OFFLINE = ["--offline", "--quick", "--n", 6, "-q", "--json"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduce")
    save_model(folder / "model", layers=2, heads=2)
    save_prompts(folder / "prompts.jsonl")
    return folder


def reproduced(pahq: Pahq, *words: object) -> dict[str, Any]:
    answer = pahq("reproduce", *words)
    assert (answer.code, answer.err) == (0, "")
    return json.loads(answer.out)


def test_areas_are_those_of_the_runs(pahq: Pahq, tmp_path: Path) -> None:
    words = ("table-auc", *OFFLINE, "--truths", "trained-sum", "--methods", "acdc,rtn,eap", "--out", tmp_path / "out")
    record = reproduced(pahq, *words)
    truth = load_truth("trained-sum")
    rows = {(row["metric"], row["method"]): row for row in record["rows"]}
    assert set(rows) == {(metric, method) for metric in ("kl_div", "logit_diff") for method in ("acdc", "rtn", "eap")}
    for (metric, method), row in rows.items():
        folders = sorted((tmp_path / "out" / RUNS).glob(f"trained-sum-{metric}-{method}*"))
        assert len(folders) == row["runs"] == (1 if method == "eap" else 2)
        circuits = [Circuit.load(folder) for folder in folders]
        if method != "eap":
            points = [rates(circuit.mask, truth.mask, truth.graph.edges) for circuit in circuits]
            assert row["auc_edges"] == pytest.approx(auc(points))
        else:  # the share of pairs of an edge inside and one outside that are ranked rightly
            scores = np.abs(circuits[0].effects)
            inside, outside = scores[truth.mask], scores[truth.graph.edges & ~truth.mask]
            wins = (inside[:, None] > outside).mean() + (inside[:, None] == outside).mean() / 2
            assert row["auc_edges"] == pytest.approx(wins)
    assert rows["kl_div", "acdc"]["auc_edges"] > 0.98
    assert "0.982" in rows["kl_div", "acdc"]["paper_auc_edges"]
    assert rows["logit_diff", "rtn"]["paper_auc_edges"] is None
    assert not record["failures"]
    table = list(csv.DictReader(io.StringIO((tmp_path / "out" / "table-auc.csv").read_text())))
    assert [float(row["auc_edges"]) for row in table] == [row["auc_edges"] for row in record["rows"]]
    assert len((tmp_path / "out" / "table-auc-runs.csv").read_text().splitlines()) == 1 + 10
    assert json.loads((tmp_path / "out" / "table-auc.json").read_text())["rows"] == record["rows"]


def test_it_goes_on_where_it_was(pahq: Pahq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, begun = cells_module.execute, list[str]()

    def counted(config: Any, folder: Path, **how: Any) -> Any:
        if len(begun) == 2:
            raise KeyboardInterrupt
        begun.append(folder.name)
        return plain(config, folder, **how)

    monkeypatch.setattr(cells_module, "execute", counted)
    words = ("table-auc", *OFFLINE, "--truths", "trained-sum", "--metrics", "kl", "--methods", "acdc,exact")
    stopped = pahq("reproduce", *words, "--out", tmp_path / "out")
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1].startswith("interrupted; the same command goes on")
    assert len(begun) == 2
    assert not (tmp_path / "out" / "table-auc.json").exists()
    begun.clear()
    record = reproduced(pahq, *words, "--out", tmp_path / "out")
    assert begun == ["trained-sum-kl_div-exact"]
    begun.clear()
    again = reproduced(pahq, *words, "--out", tmp_path / "out")
    assert begun == []
    assert again["rows"] == record["rows"]
    other = pahq("reproduce", *(7 if word == 6 else word for word in words), "--out", tmp_path / "out")
    assert "n is 6 there, 7 here" in other.error


def test_a_failing_cell_stops_no_other(tmp_path: Path) -> None:
    grid = Grid(tmp_path, Watch())
    setting = on_truth("trained-sum", n=6)
    bad = Cell(setting, "bad", "kl_div", {"threshold": 0.1, "policy": "no-such-policy"})
    lost = Setting("lost", "no-such-model", "ioi", common={"n": 6})
    cells = [bad, Cell(lost, "acdc", "kl_div", {"threshold": 0.1}), Cell(setting, "acdc", "kl_div", {"threshold": 0.1})]
    assert list(grid.run(cells)) == ["trained-sum-kl_div-acdc-0.1"]
    assert set(grid.failures) == {"trained-sum-kl_div-bad-0.1", "lost-kl_div-acdc-0.1"}
    assert "no-such-model" in grid.failures["lost-kl_div-acdc-0.1"]
    summed, runs = curve(grid, Setting("lost", "x", "ioi", "no-such-truth"), "acdc", "kl_div", (0.1,), {})
    assert (summed, runs) == (None, [])
    assert "no-such-truth" in grid.failures["lost-kl_div-acdc"]


def test_runtime(files: Path, tmp_path: Path) -> None:
    how = GridOptions(True, True, model=str(files / "model"), task=str(files / "prompts.jsonl"), thresholds="0.01", n=4)
    record = table_runtime(tmp_path / "out", how, Watch(), separate=False)
    rows = {row["method"]: row for row in record["rows"]}
    assert rows["acdc"]["share_of_acdc"] == 1
    assert rows["pahq"]["same_edges"]
    assert rows["pahq-values"]["paper_share"] == pytest.approx(20 / 94)
    assert rows["pahq-values"]["weight_bytes"] < 0.6 * rows["acdc"]["weight_bytes"]
    for row in rows.values():
        assert row["minutes"] > 0
        assert row["host_bytes"] > 1e6
        assert row["ms_per_test"] == pytest.approx(6e4 * row["minutes"] / row["tests"])


@pytest.mark.usefixtures("own_cache")
def test_a_cell_in_a_process_of_its_own(files: Path, tmp_path: Path) -> None:
    common = {"n": 3, "task_options": {}}
    setting = Setting("tiny", str(files / "model"), str(files / "prompts.jsonl"), common=common)
    cells = [Cell(setting, "acdc", "kl_div", {"threshold": t}) for t in (0.01, -1.0)]
    apart, here = Grid(tmp_path / "apart", Watch(), separate=True), Grid(tmp_path / "here", Watch())
    found, plain = apart.run(cells), here.run(cells[:1])
    (name,) = found
    assert np.array_equal(found[name].circuit.mask, plain[name].circuit.mask)
    assert found[name].cost["host_bytes"] > 1e6
    assert "threshold: -1.0" in apart.failures["tiny-kl_div-acdc--1"]


def test_rtn(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    model = ("--model", files / "model", "--task", files / "prompts.jsonl", "--thresholds", "0.01,0.001")
    record = reproduced(pahq, "figure-rtn", *OFFLINE, *model, "--out", tmp_path / "out")
    areas = {row["method"]: row for row in record["auc"]}
    assert areas["acdc"]["auc_against_fp32"] == 1
    assert areas["rtn"]["paper_auc"] == paper.RTN_AUC
    circuits = {
        (row["method"], row["threshold"]): Circuit.load(
            tmp_path / "out" / RUNS / f"single-kl_div-{row['method']}-{row['threshold']:g}"
        )
        for row in record["rows"]
    }
    for row in record["rows"]:
        circuit, fp32 = (circuits[method, row["threshold"]] for method in (row["method"], "acdc"))
        assert row["kept_of_fp32"] == pytest.approx((circuit.mask & fp32.mask).sum() / fp32.mask.sum())
        tested = circuit.effects[np.isfinite(circuit.effects)]
        assert row["zero_effects"] == pytest.approx((tested == 0).sum() / len(tested))
    assert (tmp_path / "out" / "figure-rtn.png").read_bytes().startswith(b"\x89PNG")


def test_ablation_is_modelled_without_a_gpu(pahq: Pahq, tmp_path: Path) -> None:
    record = reproduced(pahq, "table-ablation", "--quick", "-q", "--json", "--out", tmp_path / "out")
    assert record["about"]["how"] == "modelled"
    rows = {row["streams"]: row for row in record["rows"]}
    assert rows["none"]["paper_times_all"] == pytest.approx(4.7)
    assert rows["all"]["times_all"] == 1
    assert rows["none"]["times_all"] >= 1
    assert rows["fp32"]["ms_per_edge"] > rows["all"]["ms_per_edge"]


def test_regression_on_a_model_that_is_not_gpt2(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    words = ("--model", files / "model", "--task", files / "prompts.jsonl", "--n", 4, "--thresholds", "0.01,0.02")
    answer = pahq("reproduce", "gpt2-ioi", *words, "--out", tmp_path / "out", "-q", "--json")
    assert answer.code == 3  # the sizes are not GPT-2's
    rows = {row["threshold"]: row for row in json.loads(answer.out)["rows"]}
    assert (rows[0.01]["paper_edges"], rows[0.01]["within"]) == (330, False)
    assert (rows[0.02]["paper_edges"], rows[0.02]["within"]) == (None, None)


def test_everything_is_shown(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    model = ("--model", files / "model", "--task", files / "prompts.jsonl", "--n", 3, "--thresholds", "0.02")
    runtime = pahq("reproduce", "table-runtime", *model, "--one-process", "--offline", "--out", tmp_path / "runtime")
    assert runtime.code == 0, runtime.err
    for word in ("paper minutes", "94.0", "20.0", "pahq-values", "threshold 0.02", "2510.23264", "written: "):
        assert word in runtime.out, word
    again = pahq("reproduce", "table-runtime", *model, "--one-process", "--offline", "--out", tmp_path / "runtime")
    assert again.out == runtime.out
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "notes.txt").write_text("mine")
    for words, error in (
        (("table-auc", "--truths", "trained-sum"), "truths: 'trained-sum' goes with offline"),
        (("table-auc", "--tasks", "poetry"), "tasks: 'poetry' is unknown; known: docstring, greaterthan, ioi"),
        (("table-auc", "--offline", "--metrics", "loss"), "metrics: 'loss' is unknown; known: kl, task"),
        (("table-auc", "--offline", "--methods", "magic"), "methods: 'magic' is unknown"),
        (("table-auc", "--offline", "--truths", "ioi-gpt3"), "truth 'ioi-gpt3' is unknown"),
        (("figure-rtn", "--thresholds", "0.1,x"), "thresholds: 'x' is no threshold"),
        (("figure-rtn", "--offline", "--n", "0"), "n: 0 prompts are too few"),
        (("table-ablation", "--out", tmp_path / "odd"), "holds something else ('notes.txt')"),
        (("table-runtime", "--offline", "--model", "no-such", "--one-process"), "none of the cells could be run"),
    ):
        out = () if "--out" in words else ("--out", tmp_path / f"new-{len(words)}-{words[-1]}")
        assert error in pahq("reproduce", *words, *out, "-q").error
        assert not list(tmp_path.glob("new*"))


def test_the_papers_grid() -> None:
    settings = {setting.name: setting for setting in GridOptions().settings()}
    assert {name: dict(s.common)["n"] for name, s in settings.items()} == {
        "docstring": 50,
        "greaterthan": 100,
        "ioi": 50,
    }
    assert [settings[name].model for name in ("ioi", "greaterthan")] == ["gpt2", "gpt2"]
    known = settings["ioi"].known
    assert known is not None
    assert known.n_edges == 1041
    assert set(PAPER_ROWS) < set(ROWS)
    assert len(paper.acdc_thresholds("ioi", "kl")) == 31
    assert len(paper.acdc_thresholds("ioi", "task")) == 21
    for task, kind, low, high in (("ioi", "kl", 1e-6, 1), ("ioi", "task", 1e-4, 1), ("greaterthan", "task", 1e-3, 0.1)):
        sweep = paper.acdc_thresholds(task, kind)
        assert (sweep[0], sweep[-1]) == (pytest.approx(low), pytest.approx(high))
        steps = np.diff([math.log(t) for t in sweep])
        assert np.allclose(steps, steps[0])
    load = settings["docstring"].get_model
    assert load is not None
    with pytest.raises(PahqError, match="TransformerLens, which downloads it, is not installed"):
        load()
