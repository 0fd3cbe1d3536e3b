"""``pahq evaluate`` and ``pahq compare`` as a user meets them."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import commands
import pahq as package
from commands import Pahq
from pahq.evaluation import mib
from pahq.evaluation.agreement import agreement
from pahq.evaluation.behaviour import behaviour
from pahq.evaluation.circuit import Circuit
from pahq.evaluation.roc import Point, auc, rates
from pahq.evaluation.truth.base import Truth
from pahq.graph import Graph
from pahq.method.select import top
from pahq.model import Transformer, load_model
from pahq.report import evaluation
from pahq.report.figures import curves
from pahq.report.finished import finished_run, group_names, run_names
from pahq.task import get_task
from pahq.task.prompts import Prompts
from tiny import RandomTask, transformer

FEW = ["--bootstrap", 20, "--knockouts", 2, "--removals", 3, "--random-circuits", 2]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ACDC runs, and one of scores, on a tiny model."""
    folder = commands.two_runs(tmp_path_factory.mktemp("runs"))
    scored_run(folder / "tight", folder / "scored")
    return folder


def scored_run(swept: Path, out: Path, seed: int = 0, method: str = "random", **config: Any) -> None:
    """A finished run of a method that scores edges, on the model and prompts of another run: 30 edges are kept."""
    circuit = Circuit.load(swept)
    graph = circuit.graph
    scores = np.where(graph.edges, np.random.default_rng(seed).normal(size=graph.shape), np.nan)
    chosen = Circuit(graph, top(graph, scores, 30, absolute=True), scores, np.full(graph.shape, -1), circuit.metadata)
    chosen.save(out)
    record = json.loads((swept / "run.json").read_text())
    record["config"] |= {"method": method, "threshold": None, "edges": 30, **config}
    record["search"] = {"seconds": 0.5, "states": 7}
    (out / "run.json").write_text(json.dumps(record))
    shutil.copy(swept / "start.json", out)


def evaluated(pahq: Pahq, *words: object) -> dict[str, Any]:
    answer = pahq(*words, "--json", "-q")
    assert (answer.code, answer.err) == (0, "")
    return json.loads(answer.out)


def test_the_figures_are_those_of_whole_passes_on_held_out_prompts(pahq: Pahq, files: Path) -> None:
    record = evaluated(pahq, "evaluate", files / "tight", *FEW)
    (run,) = record["runs"]
    circuit, task = Circuit.load(files / "tight"), get_task(str(files / "prompts.jsonl"))
    model = load_model(str(files / "model"))
    prompts = task.prompts(model, 3, 0, "test")
    plain = behaviour(model, circuit, task, prompts, "logit_diff", "resample")
    assert (run["split"], run["prompts"], run["metric"], run["ranking"]) == ("test", 3, "logit_diff", False)
    for name, other in (("full", "full"), ("circuit", "circuit"), ("empty", "corrupted")):
        assert run[name]["metric"] == pytest.approx(plain[other]["metric"], abs=1e-5)
        assert run[name]["accuracy"] == pytest.approx(plain[other]["accuracy"])
        interval = run[name]["metric_interval"]
        assert interval["low"] <= run[name]["metric"] <= interval["high"]
        assert (interval["level"], interval["samples"], interval["examples"]) == (0.95, 20, 3)
    m = [plain[name]["metric"] for name in ("circuit", "corrupted", "full")]
    assert run["circuit"]["recovered"] == pytest.approx((m[0] - m[1]) / (m[2] - m[1]), abs=1e-4)
    assert run["size"]["edges"] == run["circuit"]["edges"] == circuit.n_edges
    assert len(run["random"]["rows"]) == 2
    assert len(run["completeness"]["rows"]) == 3
    assert 0 < len(run["minimality"]["rows"]) <= 3
    assert (run["curves"], run["cpr"], run["reference"]) == ({}, None, None)
    assert run["cost"]["states"] > 0
    assert run["cost"]["host_bytes"] > 0
    held_in = evaluated(pahq, "evaluate", files / "tight", *FEW, "--split", "validation", "--n", 2)["runs"][0]
    assert held_in["prompts"] == 2
    assert held_in["circuit"]["metric"] != run["circuit"]["metric"]
    again = evaluated(pahq, "evaluate", files / "tight", *FEW)
    assert again["runs"] == record["runs"]


def test_a_ranking_has_curves_cpr_and_cmd(pahq: Pahq, files: Path) -> None:
    (run,) = evaluated(pahq, "evaluate", files / "scored", *FEW)["runs"]
    circuit = Circuit.load(files / "scored")
    assert run["ranking"]
    assert run["name"] == "random 30 edges"
    for ranking, curve in run["curves"].items():
        assert [point["asked"] for point in curve] == mib.sizes(circuit.graph.n_edges)
        for point in curve[5:]:
            mask = top(circuit.graph, circuit.effects, point["asked"], absolute=ranking == "absolute")
            assert point["edges"] == mask.sum()
        assert curve[-1]["recovered"] == pytest.approx(1, abs=1e-4)
    for ranking, points in run["curves"].items():
        f = [point["recovered"] for point in points]
        assert run["areas"][ranking] == {"cpr": pytest.approx(mib.cpr(f)), "cmd": pytest.approx(mib.cmd(f))}
    assert run["cpr"] == pytest.approx(mib.cpr([point["recovered"] for point in run["curves"]["signed"]]))
    assert run["cmd"] == pytest.approx(mib.cmd([point["recovered"] for point in run["curves"]["absolute"]]))


def test_roc_and_agreement_against_another_run(pahq: Pahq, files: Path) -> None:
    record = evaluated(pahq, "evaluate", files / "loose", files / "scored", "--against", files / "tight", *FEW)
    loose, tight = Circuit.load(files / "loose"), Circuit.load(files / "tight")
    first, second = record["runs"]
    assert first["agreement"] == pytest.approx(agreement(loose, tight))
    point = rates(loose.mask, tight.mask, loose.graph.edges)
    assert (first["reference"]["edges"]["fpr"], first["reference"]["edges"]["tpr"]) == pytest.approx(point)
    assert second["reference"]["edges"]["recall"] is not None
    by_name = {curve["name"]: curve for curve in record["roc"]}
    assert by_name["acdc"]["edges"]["auc"] == pytest.approx(auc([point]))
    assert by_name["random"]["ranking"]
    assert abs(by_name["random"]["edges"]["auc"] - 0.5) < 0.3


def test_roc_against_a_truth_file(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    tight = Circuit.load(files / "tight")
    edges = [f"{edge.sender}->{edge.receiver}" for edge in tight.edges()]
    (tmp_path / "truth.json").write_text(json.dumps({"edges": edges}))
    words = ("--truth", tmp_path / "truth.json", *FEW)
    record = evaluated(pahq, "evaluate", files / "tight", files / "loose", *words)
    (curve,) = record["roc"]  # both runs are ACDC's: one curve of two points
    assert curve["runs"] == 2
    assert curve["edges"]["auc"] == curve["edges"]["pessimistic_auc"] == 1  # one of them is the truth
    assert record["runs"][0]["reference"]["edges"]["f1"] == 1
    assert record["runs"][0]["reference"]["name"] == "truth"
    loose = Circuit.load(files / "loose")
    point = rates(loose.mask, tight.mask, tight.graph.edges)
    assert [Point(*p) for p in curve["edges"]["points"]] == sorted([point, Point(0.0, 1.0)])


def test_compare_sorts_and_writes(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs = [files / "scored", files / "loose", files / "tight"]
    answer = pahq("compare", *runs, "--truth", files / "tight" / "circuit.json", "--bootstrap", 20, "--out", out)
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1] == f"written: {out}"
    for word in ("AUC edges", "recovered", "CPR", "time", "peak memory", "states", "acdc 0.01", "random 30 edges"):
        assert word in answer.out, word
    names = ["comparison.csv", "comparison.json", "cost.png", "curves.csv", "faithfulness.png", "roc.png"]
    assert sorted(entry.name for entry in out.iterdir()) == names
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith("png"))
    record = json.loads((out / "comparison.json").read_text())
    assert record["command"].startswith("pahq compare ")
    assert [run["name"] for run in record["runs"]][-1] == "random 30 edges"
    assert len(record["agreement"]) == 3
    rows = list(csv.DictReader(io.StringIO((out / "comparison.csv").read_text())))
    for row, run in zip(rows, record["runs"], strict=True):
        assert row["name"] == run["name"]
        assert float(row["recovered"]) == run["circuit"]["recovered"]
        assert float(row["seconds"]) == run["cost"]["seconds"]
        assert int(row["states"]) == run["cost"]["states"]
    assert [row["auc_edges"] for row in rows[:2]] == ["1.0", "1.0"]
    curves = list(csv.DictReader(io.StringIO((out / "curves.csv").read_text())))
    assert len(curves) == 2 * len(mib.SHARES)

    again = pahq("compare", *runs[1:], "--bootstrap", 0, "--out", out)  # without a reference, and without a ranking
    assert again.code == 0, again.err
    assert sorted(e.name for e in out.iterdir()) == [
        "comparison.csv",
        "comparison.json",
        "cost.png",
        "faithfulness.png",
    ]
    recovered = [run["circuit"]["recovered"] for run in json.loads((out / "comparison.json").read_text())["runs"]]
    assert recovered == sorted(recovered, key=lambda share: abs(1 - share))


def test_evaluate_prints_and_writes(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--against", files / "loose", *FEW, "--unit", "edge", "--out", out]
    answer = pahq("evaluate", files / "tight", files / "scored", *words)
    assert answer.code == 0, answer.err
    for word in (
        "recovered",
        "random circuits of about",
        "CPR",
        "incompleteness",
        "minimality",
        "Jaccard",
        "AUC nodes",
    ):
        assert word in answer.out, word
    names = ["curves.csv", "evaluation.csv", "evaluation.json", "faithfulness.png", "roc.png"]
    assert sorted(entry.name for entry in out.iterdir()) == names
    quiet = pahq("evaluate", files / "tight", *FEW, "--out", out, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_from_python_on_objects(tmp_path: Path) -> None:
    model, task = transformer(layers=2, heads=2), RandomTask()
    package.discover(model=model, task=task, threshold=0.01, n=3, out=tmp_path / "run")
    how: dict[str, Any] = {"bootstrap": 20, "knockouts": 1, "removals": 1, "random_circuits": 1}
    record = package.evaluate([tmp_path / "run"], model=model, task=task, **how)
    assert record["runs"][0]["metric"] == "kl_div"
    assert record["runs"][0]["circuit"]["recovered"] == pytest.approx(
        1 - record["runs"][0]["circuit"]["kl"] / record["runs"][0]["empty"]["kl"], abs=1e-5
    )
    with pytest.raises(package.PahqError, match=r"its task was a Python object; call pahq\.evaluate"):
        package.evaluate([tmp_path / "run"], model=model, **how)
    with pytest.raises(package.PahqError, match="its model was a Python object"):
        package.evaluate([tmp_path / "run"], task=task, **how)
    with pytest.raises(package.PahqError, match=r"the weights of .* are no longer those of the run"):
        package.evaluate([tmp_path / "run"], model=transformer(2, 2, seed=1), task=task, **how)
    with pytest.raises(package.PahqError, match="unexpected keyword argument 'bootstraps'"):
        package.evaluate([tmp_path / "run"], bootstraps=3)
    with pytest.raises(package.PahqError, match="no run is given"):
        package.evaluate([])
    with pytest.raises(package.PahqError, match=r"split 'test' has 2"):
        package.evaluate([tmp_path / "run"], model=model, task=RandomTask(limit=2), **how)


def test_methods_that_score_edges_beside_acdc(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    """Real runs from discover to compare."""
    given = ["--model", files / "model", "--task", files / "prompts.jsonl", "--metric", "logit_diff", "--n", 3]
    for method in ("eap", "exact"):
        answer = pahq("discover", *given, "--method", method, "--edges", 20, "--out", tmp_path / method, "-q")
        assert answer.code == 0, answer.err
    runs = [tmp_path / "eap", tmp_path / "exact", files / "tight"]
    words = ("--against", files / "tight", *FEW)
    record = evaluated(pahq, "evaluate", *runs, *words)
    assert [run["ranking"] for run in record["runs"]] == [True, True, False]
    assert [run["name"] for run in record["runs"]] == ["eap 20 edges", "exact 20 edges", "acdc 0.01"]
    assert record["runs"][0]["cost"]["gradients"] == 1
    assert record["runs"][1]["cost"]["states"] == record["runs"][1]["size"]["total"]
    table = pahq("compare", *runs, "--truth", files / "tight" / "circuit.json", "--bootstrap", 0).out
    assert " 1 gradient" in table
    assert "ranking" in table


def test_a_truth_brings_its_own_model_and_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs on its objects; it is built once, whatever the number of runs."""
    model, task, built = transformer(layers=2, heads=2), RandomTask(), []
    for threshold in (0.01, 0.1):
        package.discover(model=model, task=task, threshold=threshold, n=3, out=tmp_path / str(threshold))
    circuit = Circuit.load(tmp_path / "0.01")

    def load(name: str, graph: Graph) -> Truth:
        built.append(name)
        return Truth(name, "", graph, circuit.mask, get_model=lambda: model, get_task=lambda: task)

    monkeypatch.setattr("pahq.report.references.load_truth", load)
    record = package.compare([tmp_path / "0.1", tmp_path / "0.01"], truth="known", bootstrap=0)
    assert built == ["known"]
    assert record["roc"][0]["edges"]["auc"] == 1
    assert [run["reference"]["edges"]["f1"] == 1 for run in record["runs"]].count(True) >= 1


class BareTask(RandomTask):
    """No answers, and a corrupted prompt that changes nothing."""

    def prompts(self, model: Transformer, n: int, seed: int = 0, split: str = "validation") -> Prompts:
        found = super().prompts(model, n, seed, split)
        none = torch.full_like(found.answers, -1)
        return replace(found, corrupt=found.clean, answers=none, wrong=none)


def test_what_is_undefined_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, task, run = transformer(layers=2, heads=2), BareTask(), tmp_path / "run"
    graph = package.discover(model=model, task=task, threshold=0.1, n=3, out=run).graph
    edges = [graph.edge_name(*map(int, place)) for place in np.argwhere(graph.edges)]
    truth = tmp_path / "truth.json"  # all edges but one, hence every node
    truth.write_text(json.dumps({"edges": [edge for edge in edges if edge != "embed->m0"]}))
    record = package.evaluate([run], tmp_path / "out", model=model, task=task, truth=str(truth), bootstrap=20)
    assert (record["runs"][0]["circuit"]["recovered"], record["runs"][0]["circuit"]["accuracy"]) == (None, None)
    assert record["roc"][0]["nodes"]["auc"] is None
    evaluation.show(record, "evaluation")
    evaluation.show(record, "comparison")
    shown = capsys.readouterr().out
    for word in ("metric recovered is undefined", "accuracy is undefined", "AUC over nodes is undefined"):
        assert shown.count(word) == 2
    assert not (tmp_path / "out" / "faithfulness.png").exists()
    assert (tmp_path / "out" / "roc.png").exists()


def test_names_tell_runs_apart(files: Path) -> None:
    runs = [finished_run(files / name) for name in ("loose", "tight", "scored")]
    assert run_names(runs) == ["acdc 0.1", "acdc 0.01", "random 30 edges"]
    assert run_names([runs[0], runs[0]])[0] == f"acdc 0.1 ({files / 'loose'})"
    other = replace(runs[1], config=replace(runs[1].config, policy="pahq", seed=4, absolute=True))
    assert run_names([runs[1], other]) == ["acdc seed=0 0.01", "acdc pahq seed=4 absolute 0.01"]
    assert list(group_names(runs).values()) == ["acdc", "random"]
    moved = replace(runs[1], config=replace(runs[1].config, model="/elsewhere/model"))
    assert list(group_names([runs[1], moved]).values()) == ["acdc", "acdc (2)"]
    cut = replace(runs[2], config=replace(runs[2].config, edges=9, select="greedy"))
    assert list(group_names([runs[2], cut]).values()) == ["random"]
    more = {"method": "eap-ig", "method_options": {"steps": 9}}
    for absolute, name in ((None, "eap-ig steps=9"), (False, "eap-ig signed steps=9")):
        steps = replace(runs[2], config=replace(runs[2].config, **more, absolute=absolute))
        assert list(group_names([runs[2], steps]).values()) == ["random", name]


BAD: list[tuple[list[object], str]] = [
    (["evaluate", "nowhere"], "nowhere: there is no such folder; give the folder of a finished run"),
    (["evaluate", "{files}/model"], "there is no finished run (run.json is missing); check the path"),
    (["evaluate", "{tmp}/begun"], "this run is not finished; go on with it: pahq resume"),
    (
        ["evaluate", "{files}/tight", "--split", "later"],
        "split: 'later' is unknown; known: train, validation, test, all",
    ),
    (["evaluate", "{files}/tight", "--n", 0], "n: 0 prompts are too few"),
    (["evaluate", "{files}/tight", "--n", 99], "99 examples asked for"),
    (["evaluate", "{files}/tight", "--metric", "loss"], "metric 'loss' is unknown"),
    (["evaluate", "{files}/tight", "--truth", "no-such"], "truth 'no-such' is unknown"),
    (["evaluate", "{files}/tight", "--truth", "a", "--against", "b"], "truth, against: both would be the reference"),
    (["evaluate", "{files}/tight", "--against", "nowhere"], "nowhere: there is no such folder"),
    (["evaluate", "{files}/tight", "--against", "{tmp}/joint"], "split_qkv is True in one, False in the other"),
    (["evaluate", "{files}/tight", "--against", "{tmp}/empty"], "roc: the reference circuit keeps no edge"),
    (["evaluate", "{files}/tight", "--bootstrap", 3], "bootstrap: 3 resamples are too few"),
    (["evaluate", "{files}/tight", "--level", 95], "bootstrap: level 95.0 lies outside 0 … 1"),
    (["evaluate", "{files}/tight", "--knockouts", -1], "knockouts: -1 is below 0"),
    (["evaluate", "{files}/tight", "--unit", "layer"], "unit: 'layer' is unknown; known: node, edge"),
    (["evaluate", "{files}/tight", "--select", "threshold"], "select: 'threshold' is unknown; known: top, greedy"),
    (["evaluate", "{files}/tight", "--ranking", "none"], "ranking: 'none' is unknown"),
    (["evaluate", "{files}/tight", "--device", "abacus"], "device: 'abacus' cannot be used"),
    (["evaluate", "{files}/tight", "--out", "{files}/tight"], "holds something else"),
    (["evaluate", "{tmp}/damaged"], "not valid JSON"),
    (["evaluate", "{tmp}/gone"], "gone-model"),
    (["compare", "{files}/tight"], "compare: fewer than two runs are given"),
    (["compare", "{files}/tight", "{tmp}/nll"], "their metrics differ (logit_diff, nll); say with --metric"),
    (["compare", "{files}/tight", "{tmp}/other"], "they are runs on different models"),
    (["compare", "{files}/tight", "{tmp}/task"], "their tasks or task options differ"),
]


@pytest.fixture(scope="module")
def bad(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that cannot be evaluated or compared, each a tight run with one thing changed."""
    folder = tmp_path_factory.mktemp("bad")
    tight = Circuit.load(files / "tight")
    for name in ("joint", "empty", "damaged", "gone", "nll", "other", "task", "begun"):
        shutil.copytree(files / "tight", folder / name)
    (folder / "begun" / "run.json").unlink()
    (folder / "damaged" / "circuit.json").write_text("{")
    nothing = tight.mask & False
    Circuit(tight.graph, nothing, tight.effects, tight.order).save(folder / "empty")
    joint = Graph(tight.graph.config, split_qkv=False)
    none = np.full(joint.shape, np.nan)
    Circuit(joint, joint.edges.copy(), none, np.full(joint.shape, -1)).save(folder / "joint")
    changes = {"gone": ("config", "model", "gone-model"), "nll": ("config", "metric", "nll")}
    changes |= {"other": ("identity", "weights", "0"), "task": ("config", "task", "ioi")}
    for name, (part, key, value) in changes.items():
        file = folder / name / "run.json"
        record = json.loads(file.read_text())
        record[part][key] = value
        file.write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(("words", "error"), BAD, ids=[" ".join(map(str, words)) for words, _ in BAD])
def test_bad_input_is_one_line(
    pahq: Pahq, files: Path, bad: Path, tmp_path: Path, words: list[object], error: str
) -> None:
    given = [str(word).format(files=files, tmp=bad) for word in words]
    before = sorted(entry.name for entry in (files / "tight").iterdir())
    answer = pahq(*given, *(() if "--out" in given else ("--out", tmp_path / "out")))
    assert error in answer.error
    assert not (tmp_path / "out").exists()
    assert sorted(entry.name for entry in (files / "tight").iterdir()) == before


def test_a_metric_of_ones_own_makes_runs_comparable(pahq: Pahq, files: Path, bad: Path) -> None:
    record = evaluated(pahq, "compare", files / "tight", bad / "nll", "--metric", "kl_div", "--bootstrap", 0)
    assert {run["metric"] for run in record["runs"]} == {"kl_div"}
    assert record["runs"][0]["circuit"]["metric"] > 0


def test_evaluations_interrupted_before_their_first_pass_leave_nothing(
    pahq: Pahq, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With passes there is something to go on with: see test_evaluate_resume.py."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pahq.held_out.Examples", stop)
    answer = pahq("evaluate", files / "tight", *FEW, "--out", tmp_path / "out")
    assert answer.code == 130
    assert answer.err.splitlines()[-1] == "interrupted; nothing was written"
    assert not (tmp_path / "out").exists()


def test_the_faithfulness_plot_has_a_line_for_each_ranking(pahq: Pahq, files: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    record = evaluated(pahq, "compare", files / "tight", files / "loose", files / "scored", "--bootstrap", 0)
    curves.draw_faithfulness(figure, curves.faithfulness_rows(record["runs"]))
    (axes,), (legend,) = figure.axes, figure.legends
    assert axes.get_xscale() == "log"
    texts = sorted(text.get_text() for text in legend.get_texts())
    assert texts == ["acdc", "random, absolute scores", "random, signed scores"]
