"""Completeness and minimality where the metric is a plain function of the edges, so that both are known."""

from __future__ import annotations

import numpy as np
import pytest

import toys
from pahq.errors import PahqError
from pahq.evaluation.examples import Examples
from pahq.evaluation.knockouts import completeness, minimality, parts_of, subsets
from pahq.graph import Graph
from tiny import RandomTask, transformer

GRAPH = toys.graph()
CIRCUIT = toys.mask(
    GRAPH, "embed->m0", "m0->logits", "embed->a0.0.v", "direct->a0.0.v", "a0.0->logits", "embed->m1", "m1->logits"
)


def additive(backup: float = 0.0) -> toys.ToyExamples:
    """m0 is worth 4 and a0.0 worth 2 through their edges into the logits, m1 nothing; the head a1.0, which is not in
    the circuit, is worth ``backup`` where m0 is cut."""

    def measure(mask: np.ndarray) -> float:
        there = {name: bool(mask[GRAPH.edge(f"{name}->logits")]) for name in ("m0", "a0.0", "a1.0")}
        return -(4.0 * there["m0"] + 2.0 * there["a0.0"] + backup * (there["a1.0"] and not there["m0"]))

    return toys.ToyExamples(measure, GRAPH)


def test_parts_by_hand() -> None:
    parts = dict(parts_of(GRAPH, CIRCUIT, "node"))
    assert list(parts) == ["a0.0", "m0", "m1"]
    assert np.array_equal(parts["m1"], toys.mask(GRAPH, "m1->logits"))
    column = GRAPH.senders.index(next(s for s in GRAPH.senders if s.name == "m0"))
    assert np.array_equal(parts["m0"][:, column], GRAPH.edges[:, column])
    assert parts["m0"].sum() == GRAPH.edges[:, column].sum()
    edges = parts_of(GRAPH, CIRCUIT, "edge")
    assert len(edges) == CIRCUIT.sum()
    assert np.array_equal(np.logical_or.reduce([cut for _, cut in edges]), CIRCUIT)


def test_a_circuit_with_all_that_matters_is_complete() -> None:
    found = completeness(additive(), CIRCUIT, samples=6, seed=1)
    assert (found["parts"], len(found["rows"]), found["rows"][0]["out"]) == (3, 7, [])
    for row in found["rows"]:
        worth = -4.0 * ("m0" not in row["out"]) - 2.0 * ("a0.0" not in row["out"])
        assert row["circuit"] == row["model"] == worth
    assert (found["mean"], found["largest"]) == (0, 0)


def test_a_backup_outside_the_circuit_makes_it_incomplete() -> None:
    found = completeness(additive(backup=3.0), CIRCUIT, samples=12, seed=1)
    assert found["rows"][0]["incompleteness"] == 0  # as faithful as ever
    hit = [row for row in found["rows"] if "m0" in row["out"]]
    assert 0 < len(hit) < 12
    assert all(row["incompleteness"] == 3.0 * ("m0" in row["out"]) for row in found["rows"])
    assert found["mean"] == pytest.approx(3.0 * len(hit) / 12)
    assert found["largest"] == 3


def test_minimality_by_hand() -> None:
    found = minimality(additive(), CIRCUIT)
    assert [(row["part"], row["minimality"]) for row in found["rows"]] == [("m1", 0), ("a0.0", 2), ("m0", 4)]
    assert [row["share"] for row in found["rows"]] == pytest.approx([0, 2 / 6, 4 / 6])
    assert (found["unneeded"], found["least"], found["median"]) == (1, 0, 2)
    edges = {row["part"]: row["minimality"] for row in minimality(additive(), CIRCUIT, unit="edge")["rows"]}
    assert edges == dict.fromkeys(edges, 0.0) | {"m0->logits": 4.0, "a0.0->logits": 2.0}


def test_minimality_looks_behind_knock_outs() -> None:
    """a0.0 only matters where m0 is gone: no single removal shows it, some knock-out does."""

    def measure(mask: np.ndarray) -> float:
        return -float(mask[GRAPH.edge("m0->logits")] or mask[GRAPH.edge("a0.0->logits")])

    examples = toys.ToyExamples(measure, GRAPH)
    alone = {row["part"]: row["minimality"] for row in minimality(examples, CIRCUIT)["rows"]}
    behind = {row["part"]: row["minimality"] for row in minimality(examples, CIRCUIT, samples=8)["rows"]}
    assert alone == {"a0.0": 0, "m0": 0, "m1": 0}
    assert behind == {"a0.0": 1, "m0": 1, "m1": 0}


def test_limits_and_seeds() -> None:
    examples = additive()
    some = minimality(examples, CIRCUIT, limit=4, seed=0, unit="edge")
    assert (len(some["rows"]), some["parts"]) == (4, 7)
    assert some == minimality(additive(), CIRCUIT, limit=4, seed=0, unit="edge")
    drawn = [frozenset(r["part"] for r in minimality(examples, CIRCUIT, 2, seed=s)["rows"]) for s in range(8)]
    assert len(set(drawn)) > 1
    rows = [completeness(examples, CIRCUIT, 5, seed)["rows"] for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    chosen = subsets(3, 400, np.random.default_rng(0))
    assert chosen.any(axis=1).all()
    assert 0.45 < chosen.mean() < 0.65


def test_nothing_to_knock_out() -> None:
    nothing = completeness(additive(), CIRCUIT & False, samples=4)
    assert (len(nothing["rows"]), nothing["mean"], nothing["largest"]) == (1, None, None)
    assert minimality(additive(), CIRCUIT & False)["rows"] == []
    with pytest.raises(PahqError, match="samples make no sense"):
        completeness(additive(), CIRCUIT, samples=-1)
    with pytest.raises(PahqError, match="is no kind of part"):
        parts_of(GRAPH, CIRCUIT, "neuron")  # pyright: ignore[reportArgumentType]  (that is the point)


def test_on_a_real_model_nodes_that_nobody_reads_change_nothing() -> None:
    """Knocking a node out of the model is the model with that node's outputs replaced: twice the same by two masks."""
    model = transformer(layers=2, heads=2)
    graph = Graph(model.config)
    examples = Examples(model, RandomTask().prompts(model, 3), graph, RandomTask(), "logit_diff")
    found = completeness(examples, graph.edges.copy(), samples=3)
    assert all(row["incompleteness"] == pytest.approx(0, abs=1e-6) for row in found["rows"])  # C is M
    rows = minimality(examples, graph.edges.copy())["rows"]
    assert {row["part"] for row in rows} == {s.name for s in graph.senders if s.kind in ("head", "mlp")}
    for row in rows[:3]:
        without = graph.edges.copy()
        without[:, [s.name for s in graph.senders].index(row["part"])] = False
        assert row["minimality"] == pytest.approx(abs(examples.measure(without) - examples.full.metric.mean), abs=1e-6)
        # nobody hears what goes into it, either
        deaf = without.copy()
        deaf[[r.name.rsplit(".", 1)[0] == row["part"] or r.name == row["part"] for r in graph.receivers]] = False
        assert examples.measure(deaf) == pytest.approx(examples.measure(without), abs=1e-6)
