"""Why methods miss edges: the mechanisms on toys, and on a trained model by benchmarks/reasons.py and edge.py."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pahq.evaluation import roc
from pahq.evaluation.truth.base import load_truth
from pahq.method.hisp import divided, spread
from toys import graph, mask

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CIRCUIT = ("embed->a0.0.v", "direct->a0.0.v", "a0.0->m1", "m1->logits")


@cache
def reasons() -> Any:
    """benchmarks/reasons.py, which is no package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("reasons", BENCHMARKS / "reasons.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def auc(values: np.ndarray, truth: np.ndarray, places: np.ndarray) -> float:
    return roc.auc(roc.ranked(np.abs(values), truth, places))


def test_even_perfect_nodes_cannot_tell_an_important_heads_idle_edges_from_its_important_ones() -> None:
    toy = graph()
    truth = mask(toy, *CIRCUIT)
    nodes = reasons().perfect_nodes(toy, truth)
    assert {name for name, score in nodes.items() if score} == {"a0.0.v", "m1"}
    values = spread(toy, nodes)
    for idle in ("a0.0->logits", "embed->m1", "embed->logits"):
        assert values[toy.edge(idle)] == values[toy.edge("a0.0->m1")] == 1, idle
    assert values[toy.edge("a0.1->m1")] == values[toy.edge("embed->a0.0.q")] == 0
    false = (toy.edges & ~truth).sum()
    assert values[toy.edges & ~truth].sum() == 3
    assert auc(values, truth, toy.edges) == pytest.approx(1 - 0.5 * 3 / false)


def test_dividing_layers_lifts_idle_ones_over_working_ones() -> None:
    nodes = {"a0.0.v": 3e-6, "m0": 4e-6, "a1.0.k": 0.5, "a1.0.v": 12.0, "m1": 0.0, "m2": 0.0}
    found = divided(nodes)
    assert found["m0"] == pytest.approx(0.8)
    assert found["a1.0.k"] == pytest.approx(0.5 / np.hypot(0.5, 12))
    assert found["m0"] > found["a1.0.k"] > nodes["m0"]
    assert found["m1"] == found["m2"] == 0
    assert divided({}) == {}


def test_heads_whose_inputs_share_alike() -> None:
    toy = graph(heads=4, groups=2)
    found = reasons().alike_inputs(toy, mask(toy, "embed->a1.0.k", "direct->a1.3.q", "m0->m1"))
    names = {toy.edge_name(row, column) for row, column in np.argwhere(found)}
    first = {f"embed->a1.{x}" for x in ("0.q", "1.q", "0.k", "0.v")}
    second = {f"direct->a1.{x}" for x in ("2.q", "3.q", "1.k", "1.v")}
    assert names == first | second | {"m0->m1"}


@cache
def examined() -> dict[tuple[str, str], float]:
    rows = reasons().examine(load_truth("trained-maximum"), most=20)
    return {(row["method"], row["case"]): row["auc"] for row in rows}


def test_what_is_put_back_mends_it() -> None:
    found = examined()
    assert {method for method, _ in found} == set(reasons().REASONS)
    hisp = [score for (method, _), score in found.items() if method == "hisp"]
    assert hisp[0] < hisp[1] < hisp[2]
    assert hisp[4] == pytest.approx(hisp[5], abs=0.01)
    assert hisp[3] < hisp[4]
    assert hisp[5] == found["subnetwork-probing", "nodes scored perfectly"] < 1
    eap = [score for (method, _), score in found.items() if method == "eap"]
    assert eap[0] < 0.99
    assert eap[2:] == [1, 1, 1]
    flow = [score for (method, _), score in found.items() if method == "information-flow"]
    assert flow[0] < 1
    assert flow[1] == 1


def test_means_over_models() -> None:
    rows = [{"setting": s, "method": "m", "case": "c", "auc": value} for s, value in (("a", 0.5), ("b", 1.0))]
    assert reasons().means(rows) == [{"method": "m", "case": "c", "auc": 0.75}]


def test_an_edge_whose_slope_says_nothing(tmp_path: Path) -> None:
    words = ["--truth", "trained-maximum", "--edge", "embed->a1.2.k", "--n", "20", "--points", "60", "--edges", "12"]
    command = [sys.executable, str(BENCHMARKS / "edge.py"), *words, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out").read_text())
    found = written["figures"]
    assert found["eap"] == pytest.approx(found["finite_difference"], rel=0.1)
    assert abs(found["eap"]) < 0.02 * found["exact"]
    assert found["integral"] == pytest.approx(found["exact"], rel=0.1)
    assert found["eap_ig"] > 0.3 * found["exact"]
    assert found["rank_by_size"] > 5  # of a circuit of five edges
    assert len(written["details"]["path"]) == 62
    assert found["recovered_with_edge"] >= found["recovered"] - 1e-6


def test_refusals() -> None:
    for words, said in (
        (("edge.py", "--truth", "trained-maximum", "--edge", "m9->m8"), "m9"),
        (("reasons.py", "--methods", "acdc"), "methods: 'acdc' is not examined; known: hisp"),
    ):
        done = subprocess.run(
            [sys.executable, str(BENCHMARKS / words[0]), *words[1:]], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
