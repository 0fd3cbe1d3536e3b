"""Known circuits' models and prompts as names that every command takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import pahq as package
from commands import Pahq
from pahq.cli.truth import command_of
from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.evaluation.truth import load_truth
from pahq.evaluation.truth.tracr_task import Reverse
from pahq.graph import Graph
from pahq.model import load_model
from tiny import save_model

NAME = "trained-sum"
WORDS = ("--model", NAME, "--task", NAME, "--metric", "kl_div", "-n", 8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of EAP-IG by names."""
    folder = tmp_path_factory.mktemp("runs")
    package.discover(NAME, NAME, metric="kl_div", n=8, method="eap-ig", edges=20, out=folder / "eap-ig", view=False)
    return folder


def test_a_search_finds_the_circuit(pahq: Pahq, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = pahq("discover", *WORDS, "--threshold", 0.01, "--out", out, "--no-view")
    assert found.code == 0, found.err
    truth = load_truth(NAME)
    assert np.array_equal(Circuit.load(out).mask, truth.mask)
    given = {**truth.options(), "n": 8}
    assert np.array_equal(package.discover(truth.model(), truth.task(), 0.01, **given).mask, truth.mask)
    (out / "run.json").unlink()
    (out / "circuit.safetensors").unlink()
    assert pahq("resume", out, "--no-view").code == 0
    assert np.array_equal(Circuit.load(out).mask, truth.mask)


def test_runs_are_evaluated_and_viewed(pahq: Pahq, runs: Path, tmp_path: Path) -> None:
    words = ("--truth", NAME, "--knockouts", 0, "--removals", 0, "--random-circuits", 0, "--bootstrap", 0, "--json")
    record = json.loads(pahq("evaluate", runs / "eap-ig", *words).out)
    assert record["runs"][0]["split"] == "test"
    assert record["roc"][0]["edges"]["auc"] > 0.98
    viewed = pahq("view", runs / "eap-ig", "--truth", NAME, "--out", tmp_path / "page.html", "-q")
    assert viewed.code == 0, viewed.err


def test_precision_and_sweeps_take_the_names(pahq: Pahq, tmp_path: Path) -> None:
    snr = pahq(
        "precision", "snr", "--model", NAME, "--task", NAME, "-n", 4, "--policy", "bf16", "--out", tmp_path / "s"
    )
    assert snr.code == 0, snr.err
    sweep = pahq("sweep", "--tasks", NAME, "--models", NAME, "--thresholds", "0.1,0.01", "--dry-run", "--json")
    assert sweep.code == 0, sweep.err
    assert sweep.out.count(f"--task {NAME}") == 2


def test_prompts_are_shown_as_numbers(pahq: Pahq) -> None:
    shown = json.loads(pahq("tasks", "show", NAME, "--n", 2, "--json").out)
    assert (shown["model"], shown["accuracy"]["clean"]) == (NAME, 1.0)
    assert all(word.strip().isdigit() for pair in shown["prompts"] for word in pair["clean"])


def test_the_command_is_told(pahq: Pahq) -> None:
    words = "pahq discover --model trained-sum --task trained-sum --threshold 0.01 --metric kl_div -n 100"
    assert f"search it: {words}" in pahq("truth", NAME).out.splitlines()
    truth = load_truth(NAME)
    graph = Graph(replace(truth.graph.config, positions="learned"), split_pos=True, direct_edges=False)
    other = replace(truth, graph=graph, mask=graph.edges, metric="l2", ablation="zero", n=6, seed=3)
    assert command_of(other).endswith("--metric l2 -n 6 --ablation zero --seed 3 --no-direct-edges --split-pos")
    assert "search it" not in pahq("truth", "ioi-gpt2").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "trained-smu", "--task", NAME), "truth 'trained-smu' is unknown; did you mean 'trained-sum'?"),
        (("--model", NAME, "--task", "trained-"), "truth 'trained-' is unknown"),
        ((*WORDS, "--task-option", "x=1"), "task 'trained-sum': option 'x' is unknown; it has none"),
        ((*WORDS, "--fold-ln"), "fold_ln: 'trained-sum' is taken as it is known; leave the option out"),
        (("--model", NAME, "--task", "interpbench:/none"), "InterpBench case '/none': there is no such folder"),
    ],
)
def test_bad_input_is_one_line(words: tuple[object, ...], message: str, pahq: Pahq, tmp_path: Path) -> None:
    assert message in pahq("discover", *words, "--threshold", 0.1, "--out", tmp_path / "run").error
    assert not (tmp_path / "run" / "start.json").exists()


@pytest.mark.parametrize("task", [NAME, "tracr-reverse"])
def test_a_model_that_reads_text_is_refused(task: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", layers=1, heads=2)
    source = Reverse() if task == Reverse.name else load_truth(task).task()
    with pytest.raises(
        PahqError, match=f"its prompts are token numbers of its own model, not of model; take .* {task}"
    ):
        source.prompts(load_model(str(tmp_path / "model")), 2)


def test_a_case_in_a_folder_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pahq.inputs import absolute
    from pahq.report.config import RunConfig

    (tmp_path / "11").mkdir()
    monkeypatch.chdir(tmp_path)
    config = RunConfig("interpbench:11", "prompts.jsonl", 0.1)
    assert absolute(config).model == f"interpbench:{tmp_path / '11'}"
