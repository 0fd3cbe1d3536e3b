"""Head importance scores against derivatives taken node by node and example by example with finite differences."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given

from kept_work import Kept, Killed
from pahq.engine.gradients import Gradients
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.method.base import Problem
from pahq.method.hisp import HispOptions, Kinds, hisp_scores, spread
from pahq.model.config import ModelConfig
from pahq.model.transformer import build
from pahq.precision.policy import get_policy
from pahq.task.prompts import last_position
from random_models import Case, cases, drawn, random_weights

SLOPED = ("logit_diff", "greaterthan", "nll")
STEP = 1e-5
CFG = ModelConfig(3, 4, 2, 12, 4, 16, 20, 20, 8, gated=True, act="silu", norm="rms", positions="rotary", rotary_dim=4)


def twin_nodes(case: Problem, kinds: Kinds) -> dict[str, float]:
    """Scores of nodes, each scaled by itself between the reference run's value and its own."""
    graph = Graph(case.model.config, split_pos=case.graph.split_pos)
    total: defaultdict[str, float] = defaultdict(float)
    weights = case.prompts.read_mask.sum(-1) / case.prompts.read_mask.sum()
    whole = Gradients(case.model, case.prompts, graph, case.metric, case.ablation)
    for example, weight in enumerate(weights.tolist()):
        one = whole.part([example])

        def slope(rows: Any, columns: Any, one: Gradients = one) -> float:
            values = []
            for sign in (1, -1):
                gates = one.ones()
                gates[rows, columns] += sign * STEP
                values.append(one.value(gates))
            return (values[0] - values[1]) / (2 * STEP)

        if kinds == "qkv":
            for row, receiver in enumerate(graph.receivers):
                if receiver.is_attention:
                    total[receiver.name] += weight * abs(slope(row, graph.direct))
        for column, sender in enumerate(graph.senders):
            if sender.kind == "mlp" or (sender.kind == "head" and kinds == "heads"):
                total[sender.name] += weight * abs(slope(slice(None), column))
    return dict(total)


def twin_edges(graph: Graph, nodes: dict[str, float]) -> np.ndarray:
    """An edge is there for thresholds at which both its ends are; its score is the last of these."""
    levels = sorted({*nodes.values()})
    out, size = np.zeros(graph.shape), graph.config.group_size

    def stays(layer: int, head: int, level: float) -> bool:
        names = [f"a{layer}.{head}", f"a{layer}.{head}.q", f"a{layer}.{head // size}.k", f"a{layer}.{head // size}.v"]
        return any(nodes.get(name, -1.0) >= level for name in names)

    for level in levels:
        for row, receiver in enumerate(graph.receivers):
            if receiver.kind == "logits":
                reads = True
            elif receiver.kind == "mlp" or receiver.name in nodes:
                reads = nodes[receiver.name] >= level
            else:
                reads = any(stays(receiver.layer, head, level) for head in graph.heads_of(receiver))
            for column in np.flatnonzero(graph.edges[row]):
                if column == graph.direct:
                    writes = True
                else:
                    s = graph.senders[column]
                    writes = s.layer < 0 or (
                        nodes[s.name] >= level if s.kind == "mlp" else stays(s.layer, s.index, level)
                    )
                if reads and writes:
                    out[row, column] = level
    return out


def test_equals_finite_differences_on_every_architecture() -> None:
    features: Counter[str] = Counter()

    @drawn(45)
    @given(case=cases(metrics=SLOPED))
    def check(case: Case) -> None:
        kinds, memory = get_args(Kinds)[case.seed % 2], (1 << 30, 1)[case.seed // 4 % 2]
        problem = Problem(case.model, case.prompts, case.graph, case.metric, case.ablation, memory_limit=memory)
        found = hisp_scores(problem, HispOptions(kinds, normalise=False))
        expected = twin_edges(case.graph, twin_nodes(problem, kinds))
        np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-9 + 1e-6 * expected.max())
        assert found.notes == ()
        features.update((kinds, case.ablation, f"groups {case.model.config.group_size > 1}", f"memory {memory}"))
        features[f"joint {not case.graph.split_qkv}"] += 1

    check()
    assert len(features) == 2 + 3 + 2 + 2 + 2, sorted(features)


def grouped(metric: str = "logit_diff", n: int = 4, dtype: torch.dtype = torch.float64, **options: Any) -> Problem:
    model = build(CFG, random_weights(CFG, 0, set(), dtype))
    tokens = torch.randint(20, (2, n, 6), generator=torch.Generator().manual_seed(0))
    prompts = last_position(tokens[0], tokens[1], [[i] for i in range(n)], [[i + 4] for i in range(n)])
    return Problem(model, prompts, Graph(CFG), metric, **options)


def test_the_corrupted_base_is_the_clean_one_of_swapped_prompts() -> None:
    problem = grouped()
    prompts = problem.prompts
    swapped = replace(problem, prompts=replace(prompts, clean=prompts.corrupt, corrupt=prompts.clean))
    at_corrupted = hisp_scores(problem, HispOptions(base="corrupted"))
    np.testing.assert_allclose(at_corrupted.values, hisp_scores(swapped, HispOptions()).values, rtol=1e-9, atol=1e-12)
    assert not np.allclose(at_corrupted.values, hisp_scores(problem, HispOptions()).values, rtol=0.1)


def test_a_metric_without_slope_gives_way_and_says_so() -> None:
    found = hisp_scores(grouped("kl_div", fallbacks=("logit_diff",)), HispOptions())
    assert np.array_equal(found.values, hisp_scores(grouped(), HispOptions()).values)
    assert "'kl_div' has no slope at the clean run" in found.notes[0]
    assert found.stats["metric"] == "logit_diff"
    found = hisp_scores(grouped("kl_div"), HispOptions())
    assert found.stats["base"] == "corrupted"
    assert found.values[Graph(CFG).edges].min() > 0
    assert "corrupted run" in found.notes[0]


@pytest.mark.parametrize("kinds", get_args(Kinds))
def test_every_layer_is_divided_by_its_length(kinds: Kinds) -> None:
    problem = grouped()
    nodes = twin_nodes(problem, kinds)
    for layer in range(CFG.n_layers):
        here = [name for name in nodes if name.lstrip("am").split(".")[0] == str(layer)]
        assert len(here) == (1 + CFG.n_heads + 2 * CFG.n_kv_heads if kinds == "qkv" else 1 + CFG.n_heads)
        length = sum(nodes[name] ** 2 for name in here) ** 0.5
        nodes |= {name: nodes[name] / length for name in here}
    found = hisp_scores(problem, HispOptions(kinds)).values
    np.testing.assert_allclose(found, twin_edges(problem.graph, nodes), rtol=1e-5, atol=1e-7)


def test_the_lesser_node_decides() -> None:
    graph = Graph(CFG)
    nodes = {r.name: 1.0 for r in graph.receivers if r.kind != "logits"}
    nodes |= {"a0.1.q": 0.4, "a0.0.k": 0.5, "a0.0.v": 0.3, "a0.0.q": 0.2, "m0": 0.6, "a2.3.q": 0.45}
    values = spread(graph, nodes)
    expected = {"a0.1->m0": 0.5, "a0.0->a1.1.v": 0.5, "a0.2->m0": 0.6, "m0->logits": 0.6, "embed->logits": 1.0}
    expected |= {"direct->a0.1.q": 0.4, "embed->a0.0.v": 0.3, "a0.1->a2.3.q": 0.45, "direct->a2.0.q": 1.0}
    for name, score in expected.items():
        assert values[graph.edge(name)] == score, name


def test_kills_change_nothing() -> None:
    small = grouped(memory_limit=1)
    work = Kept()
    whole = hisp_scores(small, HispOptions(), work)
    np.testing.assert_allclose(whole.values, hisp_scores(grouped(), HispOptions()).values, rtol=1e-9, atol=1e-12)
    assert work.saves == 4
    assert work.told[-1] == (4, 4)
    for kill_after in range(1, 5):
        killed = Kept(kill_after)
        with pytest.raises(Killed):
            hisp_scores(small, HispOptions(), killed)
        again = hisp_scores(small, HispOptions(), killed)
        assert np.array_equal(again.values, whole.values)  # bit for bit
        assert killed.saves == 4
    killed = Kept(1)
    with pytest.raises(Killed):
        hisp_scores(small, HispOptions(), killed)
    with pytest.raises(PahqError, match="kept for 4 pieces of the examples, not for 1; resume with the memory limit"):
        hisp_scores(grouped(), HispOptions(), killed)


def test_policies() -> None:
    def scores(policy: str) -> np.ndarray:
        return hisp_scores(grouped(dtype=torch.float32, policy=get_policy(policy)), HispOptions()).values

    plain = scores("fp32")
    np.testing.assert_allclose(plain, hisp_scores(grouped(), HispOptions()).values, rtol=1e-3, atol=1e-5)
    for policy, room in (("bf16", 0.03), ("pahq", 0.2), ("bf16-values", 0.1)):
        change = np.abs(scores(policy) - plain).max()
        assert 0 < change < room, (policy, change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": "mlp"}, "hisp: kinds 'mlp' is unknown; choose one of qkv, heads"),
        ({"base": "dirty"}, "hisp: base 'dirty' is unknown; choose one of clean, corrupted"),
        ({"normalise": "yes"}, "hisp: normalise is 'yes'; give true or false"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PahqError) as error:
        HispOptions(**options)
    assert str(error.value) == message
