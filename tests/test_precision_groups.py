"""Exact single-edge effects, heads held in FP32, and what groups of them do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given

import tiny
from pahq.engine import Engine
from pahq.engine.full import patched_logits
from pahq.errors import PahqError
from pahq.evaluation.precision.edges import edge_effects
from pahq.evaluation.precision.groups import draw, group_sizes, measure_groups, ways
from pahq.graph import Graph
from pahq.model.config import ModelConfig
from pahq.model.transformer import build
from pahq.precision.policy import get_policy
from pahq.precision.size import head_bytes, weight_bytes
from pahq.precision.store import WeightStore
from pahq.task.metrics import LogitsReadout, get_metric
from random_models import Case, cases, drawn, random_weights


@drawn(40)
@given(case=cases())
def test_single_edge_effects_are_the_patched_model_s(case: Case) -> None:
    graph, rng = case.graph, np.random.default_rng(case.seed)
    every = np.argwhere(graph.edges)
    edges = [tuple(every[i].tolist()) for i in rng.choice(len(every), min(40, len(every)), replace=False)]
    engine = Engine(case.model, case.prompts, graph, case.metric, case.ablation, screen=False)
    counted: list[int] = []
    effects = edge_effects(engine, edges, counted.append)
    assert sum(counted) == len(edges)

    def metric(mask: np.ndarray) -> float:
        return float(measure(LogitsReadout(patched_logits(case.model, case.prompts, graph, mask, case.ablation)))[0])

    measure = get_metric(
        case.metric, case.prompts, patched_logits(case.model, case.prompts, graph, graph.edges, case.ablation)
    )
    full = metric(graph.edges)
    for (row, column), effect in list(zip(edges, effects, strict=True))[:8]:
        mask = graph.edges.copy()
        mask[row, column] = False
        assert effect == pytest.approx(metric(mask) - full, abs=1e-8 * max(1.0, abs(full)))


def test_batches_that_memory_cuts_short_change_nothing() -> None:
    model = tiny.transformer(3, 4)
    prompts, graph = tiny.RandomTask().prompts(model, 4), Graph(model.config)
    edges = [tuple(edge) for edge in np.argwhere(graph.edges)[::7].tolist()]
    wide, narrow = (
        edge_effects(Engine(model, prompts, graph, memory_limit=limit, screen=False), edges) for limit in (1 << 30, 1)
    )
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=1e-6)


def test_store_keeps_chosen_heads_exact() -> None:
    cfg = ModelConfig(2, 4, 2, 24, 6, 40, 30, 30, 8)
    model = build(cfg, random_weights(cfg, 0, set(), torch.float32))
    store = WeightStore(model, replace(get_policy("int8"), heads=frozenset({(1, 2)})))
    exact = {
        (name, layer, index)
        for layer in range(2)
        for name, count in (("q", 4), ("k", 2), ("v", 2), ("o", 4))
        for index in range(count)
        if store.matrix(name, layer, index).fmt.is_exact
    }
    assert exact == {("q", 1, 2), ("k", 1, 1), ("v", 1, 1), ("o", 1, 2)}
    assert not store.matrix("mlp_in", 1).fmt.is_exact
    x = torch.randn(5, 24)
    assert torch.equal(store.matrix("q", 1, 2).multiply(x), x @ model.blocks[1].attn.W_Q[2])
    assert store.policy.to_dict()["heads"] == ["a1.2"]
    assert "heads" not in get_policy("int8").to_dict()


def test_all_heads_in_fp32_are_fp32() -> None:
    """Under a policy that lowers attention alone nothing low is left then, whatever is quantised."""
    model = tiny.transformer(3, 4)
    prompts = tiny.RandomTask().prompts(model, 4)
    found = measure_groups(
        model, prompts, "kl_div", "resample", get_policy("attention=e5m2"), 0.001, heads=4, tests=60, sizes=[0, 12]
    )
    rows = {(row["quantised"], row["group"]): row for row in found.rows}
    assert set(rows) == {(way, size) for way in ("values", "differences") for size in (0, 12)}
    for way in ("values", "differences"):
        assert rows[way, 12]["decisions"] == 1.0
        assert rows[way, 12]["error_99"] < 2e-6
        assert rows[way, 0]["error_99"] > 2e-5
        assert rows[way, 0]["bytes_high"] == 0
    assert 40 <= found.edges <= 60  # a head of the first layer has no more than three


def test_memory_and_passes() -> None:
    model = tiny.transformer(3, 4)
    prompts = tiny.RandomTask().prompts(model, 2)
    policy = get_policy("pahq-values")
    told: list[tuple[int, int]] = []
    found = measure_groups(
        model, prompts, "kl_div", "resample", policy, 0.001, 5, 20, on_step=lambda _, done, of: told.append((done, of))
    )
    assert told == [(i + 1, len(told)) for i in range(len(told))]
    one = head_bytes(model, [(0, 0)])
    for way in ("values", "differences"):
        rows = [row for row in found.rows if row["quantised"] == way]
        assert [row["group"] for row in rows] == [0, 1, 2, 4, 5, 12]
        assert [row["passes"] for row in rows] == [1, 5, 3, 2, 1, 1]
        assert [row["bytes_high"] for row in rows] == [one * size for size in (0, 1, 2, 4, 5, 12)]
        low = sum(weight_bytes(model, next(one for one in ways(policy) if one.quantised == way)).values())
        assert all(row["bytes"] == low + row["bytes_high"] for row in rows)
        assert all(row["seconds"] == row["seconds_base"] + row["seconds_scoring"] > 0 for row in rows)
    assert len(found.heads) == 5


def test_edges_are_drawn_into_the_heads_once() -> None:
    cfg = ModelConfig(3, 4, 2, 24, 6, 40, 30, 30, 8)
    graph = Graph(cfg)
    drawn_edges = draw(graph, 8, 40, 3)
    assert drawn_edges == draw(graph, 8, 40, 3) != draw(graph, 8, 40, 4)
    flat = [edge for some in drawn_edges.values() for edge in some]
    assert len(flat) == len(set(flat))
    assert len(drawn_edges) == 8
    for (layer, head), edges in drawn_edges.items():
        for row, column in edges:
            receiver = graph.receivers[row]
            assert receiver.layer == layer
            assert head in graph.heads_of(receiver)
            assert graph.edges[row, column]
            assert column != graph.direct


def test_sizes() -> None:
    assert group_sizes(8, 270) == [0, 1, 2, 4, 8, 270]
    assert group_sizes(5, 12) == [0, 1, 2, 4, 5, 12]
    assert group_sizes(1, 1) == [0, 1]


@pytest.mark.parametrize(
    ("policy", "heads", "tests", "sizes", "message"),
    [
        ("fp32", 2, 8, None, "everything is FP32"),
        ("pahq", 99, 99, None, "heads: 99 of tiny's 8 heads"),
        ("pahq", 0, 9, None, "heads: 0 of"),
        ("pahq", 4, 3, None, "tests: 3 edges are too few for 4 heads"),
        ("pahq", 2, 8, [-1], "sizes: -1 is no size"),
        ("pahq", 2, 8, [], "sizes: none is no size"),
    ],
)
def test_bad_options(policy: str, heads: int, tests: int, sizes: list[int] | None, message: str) -> None:
    model = tiny.transformer(2, 4)
    prompts = tiny.RandomTask().prompts(model, 2)
    with pytest.raises(PahqError, match=message):
        measure_groups(model, prompts, "kl_div", "resample", get_policy(policy), 0.1, heads, tests, sizes=sizes)
