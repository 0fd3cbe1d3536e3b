"""Agreement of circuits, circuits beside a reference, and circuits as networks, on toys worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import networkx
import numpy as np
import pytest

import toys
from pahq.errors import PahqError
from pahq.evaluation.agreement import agreement, check_same, overlap
from pahq.evaluation.reference import Reference, areas, beside, is_ranking, node_scores
from pahq.evaluation.roc import Point, auc, pessimistic_auc, rates
from pahq.evaluation.truth.base import node_mask, node_names
from pahq.graph import Graph

GRAPH = toys.graph()


def test_overlap_by_hand() -> None:
    kept, reference = np.array([1, 1, 1, 0, 0, 0], dtype=bool), np.array([1, 0, 0, 1, 0, 0], dtype=bool)
    assert overlap(kept, reference) == {
        "precision": pytest.approx(1 / 3),
        "recall": pytest.approx(1 / 2),
        "f1": pytest.approx(0.4),
        "jaccard": pytest.approx(1 / 4),
    }
    nothing = kept & False
    assert overlap(nothing, reference) == {"precision": None, "recall": 0, "f1": 0, "jaccard": 0}
    assert overlap(nothing, nothing) == {"precision": None, "recall": None, "f1": 1, "jaccard": 1}


def test_agreement_by_hand() -> None:
    effects = np.full(GRAPH.shape, np.nan)
    places = [GRAPH.edge(name) for name in ("m0->logits", "m1->logits", "embed->logits", "embed->m0")]
    for place, value in zip(places, (4.0, 3.0, 2.0, 1.0), strict=True):
        effects[place] = value
    other = effects.copy()
    other[places[0]], other[places[1]] = 3.0, 4.0  # the two best change places
    other[places[3]] = np.nan  # measured by one only
    a = toys.circuit(GRAPH, toys.mask(GRAPH, "m0->logits", "embed->m0"), effects)
    b = toys.circuit(GRAPH, toys.mask(GRAPH, "m0->logits", "embed->logits", "m1->logits"), other)
    found = agreement(a, b)
    assert found["decisions"] == pytest.approx(1 - 3 / GRAPH.n_edges)
    assert (found["precision"], found["recall"]) == (0.5, pytest.approx(1 / 3))
    assert found["jaccard"] == 0.25
    assert found["measured"] == 3
    assert found["spearman"] == pytest.approx(0.5)  # ranks 2, 1, 0 and 1, 2, 0
    assert agreement(a, a) | {"decisions": 1.0, "f1": 1.0, "jaccard": 1.0, "spearman": pytest.approx(1)} == agreement(
        a, a
    )


def test_other_graphs_are_refused() -> None:
    for other, why in (
        (toys.graph(split_qkv=False), "split_qkv is True in one, False in the other"),
        (toys.graph(direct_edges=False), "direct_edges is True in one"),
        (toys.graph(layers=3), f"toy has {GRAPH.n_edges:,} edges"),
    ):
        with pytest.raises(PahqError, match=f"^here and there: their graphs differ .{why}"):
            check_same(GRAPH, other, ("here", "there"))
    check_same(GRAPH, toys.graph(), ("here", "there"))


def test_beside_a_reference_over_edges_and_nodes() -> None:
    wanted = toys.mask(GRAPH, "embed->a0.0.v", "direct->a0.0.v", "a0.0->logits")
    kept = toys.mask(GRAPH, "embed->a0.0.v", "direct->a0.0.v", "a0.0->m1", "m1->logits")
    found = beside(toys.circuit(GRAPH, kept), Reference("truth", GRAPH, wanted))
    assert found["edges"]["recall"] == pytest.approx(2 / 3)
    assert found["edges"]["fpr"] == pytest.approx(2 / (GRAPH.n_edges - 3))
    # nodes of the truth: embed, a0.0.v, a0.0, logits; the circuit has these, m1's input and its output
    names = np.array(node_names(GRAPH))
    assert set(names[node_mask(GRAPH, kept)]) == {"embed", "a0.0.v", "a0.0", "m1.in", "m1", "logits"}
    assert found["nodes"]["recall"] == 1
    assert found["nodes"]["precision"] == pytest.approx(4 / 6)
    assert found["nodes"]["fpr"] == pytest.approx(2 / (len(names) - 4))


def test_nodes_of_a_ranking_are_the_end_points_of_its_circuits() -> None:
    scores = np.random.default_rng(0).integers(0, 30, GRAPH.shape).astype(float)
    values = node_scores(GRAPH, scores)
    for threshold in range(31):
        assert np.array_equal(values >= threshold, node_mask(GRAPH, GRAPH.edges & (scores >= threshold)))


def test_areas_of_several_runs_and_of_a_ranking() -> None:
    draw = np.random.default_rng(1)
    wanted = GRAPH.edges & (draw.random(GRAPH.shape) < 0.1)
    reference = Reference("truth", GRAPH, wanted)
    scores = np.where(wanted, 2.0, 0.0) - 3 * draw.random(GRAPH.shape)
    # every threshold as a run of its own gives the ranking's curve
    runs = [toys.circuit(GRAPH, GRAPH.edges & (np.abs(scores) >= t), swept=True) for t in np.abs(scores[GRAPH.edges])]
    one_by_one = areas(runs, reference)
    ranking = areas([toys.circuit(GRAPH, wanted, scores)], reference)
    assert (one_by_one["ranking"], ranking["ranking"], ranking["runs"]) == (False, True, 1)
    for kind in ("edges", "nodes"):
        for name in ("auc", "pessimistic_auc"):
            assert ranking[kind][name] == pytest.approx(one_by_one[kind][name])
        assert ranking[kind]["pessimistic_auc"] <= ranking[kind]["auc"]
    signed = areas([toys.circuit(GRAPH, wanted, scores)], reference, absolute=False)
    assert signed["edges"]["auc"] > ranking["edges"]["auc"]  # scores are high where wanted, their sizes are not

    two = [toys.circuit(GRAPH, wanted & (draw.random(GRAPH.shape) < p), swept=True) for p in (0.3, 0.7)]
    points = [rates(c.mask, wanted, GRAPH.edges) for c in two]
    found = areas(two, reference)["edges"]
    assert found["auc"] == auc(points)
    assert found["pessimistic_auc"] == pessimistic_auc(points)
    assert [Point(*point) for point in found["points"]] == sorted(points)
    perfect = areas([toys.circuit(GRAPH, wanted, np.where(wanted, -1.0, 0.5))], reference)
    assert perfect["edges"]["auc"] == perfect["edges"]["pessimistic_auc"] == 1


def test_a_sweep_is_no_ranking() -> None:
    kept = toys.mask(GRAPH, "m0->logits")
    assert is_ranking(toys.circuit(GRAPH, kept))
    assert not is_ranking(toys.circuit(GRAPH, kept, swept=True))
    some = np.where(GRAPH.edges, 0.0, np.nan)
    some[GRAPH.edge("m0->logits")] = np.nan
    assert not is_ranking(toys.circuit(GRAPH, kept, some))


@pytest.mark.parametrize("groups", [2, 1])
def test_a_circuit_as_a_network(groups: int) -> None:
    on = toys.graph(groups=groups)
    full = toys.circuit(on, on.edges.copy()).to_networkx()
    assert networkx.is_directed_acyclic_graph(full)
    assert {node for node, degree in full.in_degree() if not degree} == {"embed"}
    assert {node for node, degree in full.out_degree() if not degree} == {"logits"}
    kinds = [kind for _, _, kind in full.edges(data="kind")]
    assert kinds.count("addition") == on.n_addition
    assert set(full.predecessors("a1.1")) == {"a1.1.q", f"a1.{groups - 1}.k", f"a1.{groups - 1}.v"}
    one = toys.circuit(on, toys.mask(on, "embed->a0.0.v", "direct->a0.0.v", "a0.0->m1", "m1->logits", "m0->logits"))
    network = one.to_networkx()
    path = ["embed", "a0.0.v", "a0.0", "m1", "logits"]
    assert list(networkx.all_simple_paths(network, "embed", "logits")) == [path]
    assert network.edges["a0.0.v", "a0.0"]["kind"] == "direct"
    assert network.edges["m1", "logits"] == {"kind": "addition", "effect": 0.0, "order": -1}


def test_a_network_without_direct_edges_links_inputs_to_heads() -> None:
    on = toys.graph(split_qkv=False, direct_edges=False)
    network = toys.circuit(on, toys.mask(on, "embed->a0.1.qkv", "a0.1->logits")).to_networkx()
    assert networkx.has_path(network, "embed", "logits")
    assert network.edges["a0.1.qkv", "a0.1"] == {"kind": "link"}


def test_a_reference_on_another_model_is_no_graph_of_ours() -> None:
    other = Graph(replace(GRAPH.config, n_heads=4, n_kv_heads=4))
    with pytest.raises(PahqError, match="their graphs differ"):
        agreement(toys.circuit(GRAPH, GRAPH.edges.copy()), toys.circuit(other, other.edges.copy()))
