"""``pahq methods`` and ``pahq discover --method``, as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import Pahq, options
from pahq.cli.options import method_options
from pahq.evaluation.circuit import Circuit
from pahq.method.registry import METHODS, SCORING
from scored_runs import QUICK


def of_method(given: dict[str, Any]) -> list[object]:
    return [word for name, value in given.items() for word in ("--method-option", f"{name}={value}")]


def test_methods_are_listed_with_their_options(pahq: Pahq) -> None:
    listed = pahq("methods")
    assert listed.code == 0
    for name in METHODS:
        assert name in listed.out
    for option in ("steps=", "variant=inputs", "sparsity=", "tau=0.0", "normalise=true"):
        assert option in listed.out
    facts = {method["name"]: method for method in json.loads(pahq("methods", "--json").out)}
    assert facts["acdc"]["options"] == {}
    assert facts["eap-ig"]["options"]["steps"] == 5
    assert set(facts) == set(METHODS)


@pytest.mark.parametrize("metric", ["logit_diff", "kl_div"])
@pytest.mark.parametrize("method", SCORING)
def test_every_method_runs(method: str, metric: str, pahq: Pahq, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*options(files, method=method, metric=metric, edges=20), *of_method(QUICK[method]), "--out", out]
    first = pahq("discover", *words)
    assert first.code == 0, first.err
    for word in (
        method,
        metric,
        "top 20 edges",
        "all edges scored",
        "accuracy",
        "largest edges score",
        f"written: {out}",
    ):
        assert word in " ".join(first.out.split())  # long paths wrap
    facts = json.loads(pahq("show", out, "--json").out)
    assert 0 < facts["size"]["addition"] + facts["size"]["direct"] <= 20
    assert facts["search"]["selection"]["selected"] == facts["size"]["addition"] + facts["size"]["direct"]
    assert facts["config"]["method_options"] == QUICK[method]
    again = pahq("discover", *words)
    assert (again.code, again.out) == (0, "")
    assert "this run is finished" in again.err
    assert (
        "holds another run (edges is 20 there, 21 here)"
        in pahq(
            "discover", *options(files, method=method, metric=metric, edges=21), *of_method(QUICK[method]), "--out", out
        ).error
    )


def test_options_that_all_methods_share(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    words = options(
        files, method="eap", metric="logit_diff", edges=15, select="greedy", ablation="mean", seed=3, dtype="float64"
    )
    flags = ["--absolute", "--no-split-qkv", "--no-direct-edges", "--split-pos", "--fold-ln", "-q", "--json"]
    answer = pahq("discover", *words, *flags, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    assert facts["search"]["selection"]["rule"] == "greedy"
    assert facts["size"]["direct_total"] == 0


def test_attribution_goes_by_size_unless_told_otherwise(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    masks = {}
    for flag in ("", "--absolute", "--signed"):
        out = tmp_path / (flag or "default")
        words = options(files, method="eap", metric="logit_diff", edges=15)
        assert pahq("discover", *words, *([flag] if flag else []), "-q", "--out", out).code == 0
        config = json.loads((out / "run.json").read_text())["config"]
        assert config["absolute"] is (flag != "--signed")
        masks[flag] = Circuit.load(out).mask
    assert np.array_equal(masks[""], masks["--absolute"])
    assert not np.array_equal(masks[""], masks["--signed"])


def test_the_folder_has_a_name_by_default(
    pahq: Pahq, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for more, name in (
        ({"method": "random", "edges": 9}, "model-prompts-random-default-top-9"),
        ({"method": "random", "threshold": 0.5}, "model-prompts-random-default-0.5"),
        (
            {"threshold": 0.1, "prefilter": "random", "keep": 0.5, "metric": "kl_div"},
            "model-prompts-random-0.5-kl_div-0.1",
        ),
    ):
        answer = pahq("discover", *options(files, **more), "--quiet")
        assert answer.code == 0, answer.err
        assert (tmp_path / "runs" / name / "run.json").exists(), list((tmp_path / "runs").iterdir())


def test_a_prefiltered_sweep(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    words = options(files, threshold=0.01, metric="kl_div", prefilter="eap-ig", keep=0.3, method_option="steps=2")
    answer = pahq("discover", *words, "--order-by-score", "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    assert "prefilter eap-ig: 7" in answer.out
    assert "senders tested from the least score up" in answer.out
    filtered = json.loads(pahq("show", tmp_path / "run", "--json").out)["prefilter"]
    assert filtered["share_filtered"] >= 0.7
    refused = pahq("precision", "sensitivity", *options(files), "--run", tmp_path / "run", "--out", tmp_path / "s")
    assert "the run is no sweep of all edges" in refused.error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "magic", "--edges", "5"], "method: 'magic' is unknown; known: acdc, eap, "),
        (["--method", "acdc"], "threshold: method acdc needs one"),
        (["--method", "eap"], "edges: method eap sets no threshold of its own"),
        (["--method", "eap", "--edges", "5", "--check"], "check: True goes with method acdc alone"),
        (["--method", "eap", "--edges", "many"], "Invalid value for '--edges'"),
        (["--method", "eap", "--edges", "5", "--method-option", "steps"], "method option 'steps' is not NAME=VALUE"),
        (["--method", "eap", "--edges", "5", "--method-option", "stepz=1"], "method 'eap': option 'stepz' is unknown"),
        (["--method", "eap-ig", "--edges", "5", "--method-option", "steps=x"], "method 'eap-ig': option steps is 'x'"),
        (["--method", "eap-ig", "--edges", "5", "--method-option", "steps=0"], "steps 0: give a whole number"),
        (["--method", "information-flow"], "edges: method information-flow sets no threshold of its own without tau"),
        (["--method", "eap", "--edges", "99999"], "edges: 99999 lies outside 1 … "),
        (["--threshold", "0.1", "--edges", "5"], "edges: 5 goes with methods that score edges"),
        (["--threshold", "0.1", "--prefilter", "eap", "--keep", "2"], "keep: 2.0 is no share of the edges"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, pahq: Pahq, files: Path, tmp_path: Path) -> None:
    answer = pahq("discover", *options(files), *words, "--out", tmp_path / "run")
    assert message in answer.error
    assert not (tmp_path / "run" / "run.json").exists()


def test_method_options_are_read() -> None:
    given = ["steps=10", "rate=0.1", "small=1e-3", "nodes=true", "start=eap-ig", "kinds=q,k", "odd=nan"]
    assert method_options(given) == {
        "steps": 10,
        "rate": 0.1,
        "small": 1e-3,
        "nodes": True,
        "start": "eap-ig",
        "kinds": "q,k",
        "odd": "nan",
    }


def test_ctrl_c_says_how_to_go_on(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*options(files, method="edge-pruning", metric="logit_diff"), "--method-option", "steps=2000"]
    command = [sys.executable, "-m", "pahq", "discover", *map(str, words), "--out", str(out), "--quiet"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        end = time.monotonic() + 100
        while not (out / "state.safetensors").exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=100)
    assert process.returncode == 130
    assert error == f"interrupted; go on with: pahq resume {out}\n"
    assert not [entry.name for entry in out.iterdir() if entry.name.endswith(".tmp")]
