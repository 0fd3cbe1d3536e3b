"""Subnetwork probing and edge pruning: derivatives, planted circuits, sparsity, seeds, interruption, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import golden
import tiny
from pahq.engine.full import patched_logits
from pahq.engine.gradients import Gradients
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.method import hard_concrete, mask_training
from pahq.method.base import NoWork, Problem, Scores, Work
from pahq.method.eap import eap_scores
from pahq.method.eap_ig import eap_ig_scores
from pahq.method.edge_pruning import (
    EdgeMask,
    EdgePruningOptions,
    edge_pruning_scores,
    log_alphas_by_rank,
    natural_threshold,
)
from pahq.method.mask_training import Mask, prepare
from pahq.method.subnetwork_probing import NodeMask, SubnetworkProbingOptions, subnetwork_probing_scores
from pahq.model.config import ModelConfig
from pahq.model.transformer import Transformer, build
from pahq.task.metrics import LogitsReadout, get_metric
from pahq.task.prompts import Prompts, last_position
from pahq.task.score import read_logits
from random_models import Case, cases, drawn, random_weights

Method = Callable[[Problem, Any, Work], Scores]
SHORT: list[tuple[Method, Any]] = [
    (subnetwork_probing_scores, SubnetworkProbingOptions(steps=6)),
    (subnetwork_probing_scores, SubnetworkProbingOptions(steps=6, batch=3)),
    (edge_pruning_scores, EdgePruningOptions(steps=6, nodes=True)),
    (edge_pruning_scores, EdgePruningOptions(steps=6, batch=3)),
    (edge_pruning_scores, EdgePruningOptions(steps=4, start="eap-ig")),
]

LIVE = {"a0.1", "a1.2"}
"""The planted circuit: all other heads, and the MLPs, write nothing."""


def planted(split_qkv: bool = True) -> Problem:
    """A model in which two heads alone do anything, and 12 prompts."""
    cfg = ModelConfig(
        n_layers=2, n_heads=4, n_kv_heads=4, d_model=16, d_head=4, d_mlp=8, d_vocab=12, d_vocab_out=12, n_ctx=8
    )
    weights = random_weights(cfg, seed=5, drop=set())
    for name, value in weights.items():
        layer = name.split(".")[1]
        if name.endswith("attn.W_O"):
            for head in range(4):
                value[head] *= f"a{layer}.{head}" in LIVE
            value *= 2
        if name.endswith(("W_out", "b_out")):
            value.zero_()
    return Problem(build(cfg, weights), prompts(12), Graph(cfg, split_qkv=split_qkv))


def prompts(count: int) -> Prompts:
    draw = torch.Generator().manual_seed(9)
    clean, corrupt = (torch.randint(0, 12, (count, 5), generator=draw) for _ in range(2))
    corrupt[:, -1] = clean[:, -1]
    return last_position(clean, corrupt, [[i % 6] for i in range(count)], [[6 + i % 6] for i in range(count)])


def alive(graph: Graph) -> np.ndarray:
    """bool [R, S + 1]: the edges between nodes that do anything."""
    nodes = LIVE | {"embed", "logits", "direct"}
    out = np.zeros(graph.shape, dtype=bool)
    for row, column in np.argwhere(graph.edges):
        receiver = graph.receivers[row].name
        out[row, column] = graph.sender_name(column) in nodes and receiver.rsplit(".", 1)[0] in nodes
    return out


def matters(problem: Problem) -> np.ndarray:
    """bool [R, S + 1]: the edges whose removal alone moves the metric by a hundredth of its range."""
    setting, out = prepare(problem, "test"), np.zeros(problem.graph.shape, dtype=bool)
    for row, column in np.argwhere(alive(problem.graph)):
        without = problem.graph.edges.copy()
        without[row, column] = False
        out[row, column] = setting.circuit(without) - setting.full > 0.01 * setting.range
    assert out.sum() > 8
    return out


def auc(scores: Scores, truth: np.ndarray) -> float:
    """The chance that an edge of the truth scores above one that is not in it."""
    edges = scores.graph.edges
    yes, no = scores.values[edges & truth], scores.values[edges & ~truth]
    return float(((yes[:, None] > no).mean() + (yes[:, None] >= no).mean()) / 2)


# --- derivatives ------------------------------------------------------------------------------------------


def masks(case: Case) -> list[Mask]:
    draw = torch.Generator().manual_seed(case.seed)
    graph, edges = case.graph, torch.randn(case.graph.n_edges, generator=draw, dtype=torch.float64)
    pruning = EdgePruningOptions(nodes=case.seed % 2 == 0, sparsity=0.8)
    edge_mask, node_mask = EdgeMask(graph, pruning, edges, None), NodeMask(graph, SubnetworkProbingOptions())
    with torch.no_grad():
        edge_mask.multipliers += torch.tensor([0.7, 1.3])
        edge_mask.node_log_alpha += torch.randn(graph.shape[1], generator=draw)
        node_mask.log_alpha += torch.randn(len(node_mask.log_alpha), generator=draw)
    return [edge_mask, node_mask]


@given(case=cases())
@drawn(12)
def test_derivatives_of_the_loss_are_finite_differences(case: Case) -> None:
    metric = "logit_diff"
    try:
        gradients = Gradients(case.model, case.prompts, case.graph, metric, case.ablation)
    except PahqError:
        return
    measure = get_metric(metric, case.prompts, read_logits(case.model, case.prompts))

    def loss(mask: Mask) -> Tensor:
        gates = mask.gates(torch.Generator().manual_seed(1))
        parts = [soft.logits(gates)[0] for _, soft in gradients.passes()]
        return measure(LogitsReadout(torch.cat(parts)))[0] + mask.penalty(3)

    for mask in masks(case):
        named = {name: value for one in mask.parameters() for name, value in one.tensors.items()}
        gates = mask.gates(torch.Generator().manual_seed(1))
        _, slope = gradients.gradient(gates.detach())
        torch.autograd.backward([gates, mask.penalty(3)], [slope, torch.tensor(1.0, dtype=torch.float64)])
        for name, value in named.items():
            slopes = value.grad
            assert slopes is not None
            way = torch.randn(value.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            ends = []
            with torch.no_grad():
                for step in (1e-6, -2e-6):
                    value += step * way
                    ends.append(float(loss(mask)))
                value += 1e-6 * way
            measured = (ends[0] - ends[1]) / 2e-6
            assert float((slopes * way).sum()) == pytest.approx(measured, rel=1e-4, abs=1e-6), name


@given(case=cases())
@drawn(12)
def test_shut_nodes_are_a_circuit_without_their_edges(case: Case) -> None:
    """Gates of 0 and 1 on nodes give the logits of the circuit in which shut nodes' edges are cut."""
    mask = NodeMask(case.graph, SubnetworkProbingOptions())
    draw = torch.Generator().manual_seed(case.seed)
    nodes = torch.randint(0, 2, mask.log_alpha.shape, generator=draw).double()
    present = case.graph.edges.copy()
    for row, open_ in zip(mask.attention, nodes.tolist(), strict=False):
        present[row] &= bool(open_)
    for column, open_ in zip(mask.columns, nodes[len(mask.attention) :].tolist(), strict=True):
        present[:, column] &= bool(open_)
    gradients = Gradients(case.model, case.prompts, case.graph, "kl_div", case.ablation)
    with torch.no_grad():
        got = torch.cat([soft.logits(mask.spread(nodes))[0] for _, soft in gradients.passes()])
    expected = patched_logits(case.model, case.prompts, case.graph, present, case.ablation)
    torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-8)


# --- what training finds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("split_qkv", [True, False])
def test_probing_opens_the_planted_nodes_alone(split_qkv: bool) -> None:
    problem = planted(split_qkv)
    scores = subnetwork_probing_scores(problem, SubnetworkProbingOptions(regularisation=0.5), NoWork())
    assert auc(scores, alive(problem.graph)) > 0.95
    assert scores.natural is not None
    kept = problem.graph.edges & (scores.values >= scores.natural)
    names = {problem.graph.sender_name(column) for column in np.argwhere(kept)[:, 1]}
    assert names >= LIVE
    assert not (kept & ~alive(problem.graph)).any()
    assert scores.stats["metric_natural"] < 0.2 * scores.stats["metric_empty"]


def test_a_node_is_as_open_as_the_rule_says() -> None:
    """Scores of edges from log-alphas of nodes, by the definition."""
    for split in (True, False):
        cfg = ModelConfig(
            n_layers=2, n_heads=4, n_kv_heads=2, d_model=8, d_head=4, d_mlp=8, d_vocab=6, d_vocab_out=6, n_ctx=8
        )
        graph = Graph(cfg, split_qkv=split)
        mask = NodeMask(graph, SubnetworkProbingOptions())
        with torch.no_grad():
            mask.log_alpha.copy_(torch.randn(len(mask.log_alpha), generator=torch.Generator().manual_seed(1)))
        chance = hard_concrete.open_probability(mask.log_alpha.detach()).tolist()
        nodes = [graph.receivers[row].name for row in mask.attention]
        by_name = dict(zip(nodes + [graph.senders[column].name for column in mask.columns], chance, strict=True))
        assert len(by_name) == (2 * (4 + 2 + 2 + 1) if split else 2 * (4 + 1))

        def sent(name: str, split: bool = split, by_name: dict[str, float] = by_name) -> float:
            if name in ("embed", "direct"):
                return 2.0
            if name.startswith("m") or not split:
                return by_name[name]
            layer, head = name[1:].split(".")
            return max(by_name[f"a{layer}.{head}.q"], *(by_name[f"a{layer}.{int(head) // 2}.{x}"] for x in "kv"))

        def received(name: str, split: bool = split, by_name: dict[str, float] = by_name) -> float:
            if name == "logits":
                return 2.0
            if name.startswith("m") or split:
                return by_name[name]
            layer, group, _ = name[1:].split(".")
            return max(by_name[f"a{layer}.{2 * int(group) + i}"] for i in (0, 1))

        values = mask.scores()
        for row, column in np.argwhere(graph.edges):
            least = min(sent(graph.sender_name(column)), received(graph.receivers[row].name))
            if least <= 1:
                assert values[row, column] == least, graph.edge_name(row, column)
            else:
                assert values[row, column] == max(values.max(), 0.8)
        assert not values[~graph.edges].any()


@pytest.mark.parametrize("nodes", [False, True])
def test_pruning_finds_the_planted_edges(nodes: bool) -> None:
    problem = planted()
    truth = matters(problem)
    options = EdgePruningOptions(sparsity=1 - truth.sum() / problem.graph.n_edges, nodes=nodes)
    scores = edge_pruning_scores(problem, options, NoWork())
    assert auc(scores, truth) > 0.98
    assert scores.stats["metric_natural"] < 0.1 * scores.stats["metric_empty"]
    kept = problem.graph.edges & (scores.values >= scores.natural)
    assert (kept & truth).sum() > 0.8 * truth.sum()


@pytest.mark.parametrize(("metric", "sparsity"), [("kl_div", 0.5), ("kl_div", 0.9), ("logit_diff", 0.9)])
def test_pruning_reaches_its_target(metric: str, sparsity: float) -> None:
    model = tiny.transformer(layers=2)
    problem = Problem(model, tiny.RandomTask().prompts(model, 6), Graph(model.config), metric)
    scores = edge_pruning_scores(problem, EdgePruningOptions(sparsity=sparsity), NoWork())
    assert scores.stats["sparsity"] == pytest.approx(sparsity, abs=0.05)
    assert not scores.notes
    kept = scores.values[problem.graph.edges] >= scores.natural
    assert kept.mean() == pytest.approx(1 - scores.stats["sparsity"], abs=0.01)
    assert kept.sum() == scores.stats["edges_natural"]


def test_a_missed_target_is_told() -> None:
    scores = edge_pruning_scores(planted(), EdgePruningOptions(steps=3), NoWork())
    assert len(scores.notes) == 1
    assert "more steps" in scores.notes[0]


def test_the_natural_threshold_keeps_the_expected_number() -> None:
    chance = np.array([0.9, 0.1, 0.8, 0.05, 0.2])  # 2.05 are expected
    assert (chance >= natural_threshold(chance)).tolist() == [True, False, True, False, False]
    assert (np.full(4, 0.01) >= natural_threshold(np.full(4, 0.01))).sum() == 0
    assert (np.full(4, 0.99) >= natural_threshold(np.full(4, 0.99))).sum() == 4
    ties = np.array([0.9, 0.3, 0.3, 0.3, 0.3])  # 2.1 are expected, 1 or 5 can be had
    assert (ties >= natural_threshold(ties)).sum() == 1


def test_ranks_become_log_alphas() -> None:
    got = log_alphas_by_rank(np.array([0.5, -9.0, 2.0, 0.0, 0.5]), 2.0, -2.0)
    assert got.tolist() == [1.0, -2.0, 2.0, -1.0, 0.0]


@pytest.mark.skipif(not golden.case_names(), reason="the golden cases are not here; set PAHQ_GOLDEN")
def test_pruning_finds_the_edges_that_acdc_keeps() -> None:
    """On a recorded run of ACDC: nearly the same edges, and a circuit of that size which is as faithful."""
    case = golden.load("a_attn2l4h")
    truth = np.zeros(case.graph.shape, dtype=bool)
    truth[tuple(zip(*case.kept, strict=True))] = True
    problem = Problem(case.model, case.prompts, case.graph, case.metric, case.ablation)
    options = EdgePruningOptions(sparsity=1 - truth.sum() / case.graph.n_edges)
    scores = edge_pruning_scores(problem, options, NoWork())
    assert auc(scores, truth) > 0.9
    assert scores.stats["edges_natural"] == pytest.approx(truth.sum(), abs=3)
    assert scores.stats["metric_natural"] < 1.1 * case.final_metric
    assert auc(subnetwork_probing_scores(problem), truth) > 0.8


@pytest.mark.parametrize("start", ["eap", "eap-ig"])
def test_a_warm_start_goes_on_from_the_other_methods_ranks(start: Any) -> None:
    problem = planted()
    other = eap_scores(problem) if start == "eap" else eap_ig_scores(problem)
    edges, kept = problem.graph.edges, Kept()
    scores = edge_pruning_scores(problem, EdgePruningOptions(sparsity=0.9, steps=120, start=start), kept)
    assert kept.first is not None
    best = int(np.argmax(other.values[edges]))
    assert float(kept.first[best]) == 2.0
    assert float(kept.first.min()) == -1.0
    assert auc(scores, matters(problem)) > 0.95
    assert scores.notes[: len(other.notes)] == other.notes  # kl_div has no slope at the clean run: users are told


# --- seeds, interruption, memory, bad input ---------------------------------------------------------------


class Killed(Exception):
    """The run was killed."""


class Kept(NoWork):
    """Keeps states as files would, and ends the run at one of them."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at, self.saves, self.kept, self.steps = kill_at, 0, None, list[tuple[int, int]]()
        self.first: Tensor | None = None

    def progress(self, done: int, total: int) -> None:
        self.steps.append((done, total))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return None if self.kept is None else (dict(self.kept[0]), json.loads(self.kept[1]))

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.kept = {name: value.clone() for name, value in tensors.items()}, json.dumps(facts, allow_nan=False)
        assert all(value.device.type == "cpu" for value in tensors.values())
        if facts.get("step") == 0:
            self.first = self.kept[0]["log_alpha"]
        self.saves += 1
        if self.saves == self.kill_at:
            raise Killed


@pytest.mark.parametrize(("method", "options"), SHORT)
def test_a_killed_run_goes_on_to_the_same_result(method: Method, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_training, "SAVE_EVERY", 1)
    problem, whole = planted(), Kept()
    expected = method(problem, options, whole)
    assert whole.steps == [(done, options.steps) for done in range(options.steps + 1)]
    assert whole.saves >= options.steps
    for kill_at in range(1, whole.saves + 1):
        work = Kept(kill_at)
        with pytest.raises(Killed):
            method(problem, options, work)
        work.steps.clear()
        got = method(problem, options, work)
        assert np.array_equal(got.values, expected.values)
        assert got.stats == expected.stats
        assert (got.natural, got.notes) == (expected.natural, expected.notes)
        assert work.saves == whole.saves  # nothing is done again


@pytest.mark.parametrize(("method", "options"), SHORT)
def test_a_seed_decides(method: Method, options: Any) -> None:
    problem = planted()
    first, again = method(problem, options, NoWork()), method(problem, options, NoWork())
    other = method(replace(problem, seed=1), options, NoWork())
    assert np.array_equal(first.values, again.values)
    assert not np.array_equal(first.values, other.values)


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
def test_pieces_of_the_examples_give_the_same(ablation: str) -> None:
    problem = replace(planted(), ablation=ablation)
    options = EdgePruningOptions(steps=3, batch=7)
    whole = edge_pruning_scores(problem, options, NoWork())
    pieces = edge_pruning_scores(replace(problem, memory_limit=1), options, NoWork())
    np.testing.assert_allclose(whole.values, pieces.values, atol=1e-10)


@pytest.mark.parametrize("metric", ["match_nll", "kl_div", "logit_diff"])
def test_a_part_of_the_examples_is_measured_as_it_would_be_alone(metric: str) -> None:
    problem = planted()
    gradients = Gradients(problem.model, problem.prompts, problem.graph, metric)
    which, gates = [1, 4, 5], 0.6 * gradients.ones()
    alone = Gradients(problem.model, problem.prompts[which], problem.graph, metric)
    got, expected = gradients.part(which).gradient(gates), alone.gradient(gates)
    assert got[0] == pytest.approx(expected[0], rel=1e-10)
    torch.testing.assert_close(got[1], expected[1], atol=1e-10, rtol=1e-8)
    assert len(gradients.prompts) == 12


def test_nothing_global_is_changed() -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():
        edge_pruning_scores(planted(), EdgePruningOptions(steps=2), NoWork())
        assert not torch.is_grad_enabled()
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("method", "options"), SHORT[::2])
def test_weights_that_are_not_finite_stop_with_one_line(method: Method, options: Any) -> None:
    problem = planted()
    broken: Transformer = replace(problem.model, W_E=torch.full_like(problem.model.W_E, float("nan")))
    with pytest.raises(PahqError, match="became nan") as error:
        method(replace(problem, model=broken), options, NoWork())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("method", "options"), SHORT[::2])
def test_a_metric_that_no_edge_moves_stops_with_one_line(method: Method, options: Any) -> None:
    problem = planted()
    same = replace(problem.prompts, corrupt=problem.prompts.clean)
    with pytest.raises(PahqError, match="with every edge and without any"):
        method(replace(problem, prompts=same), options, NoWork())


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        (EdgePruningOptions, {"sparsity": 1.0}, "edge-pruning: sparsity is 1.0; give a number above 0 and below 1"),
        (EdgePruningOptions, {"sparsity": "much"}, "edge-pruning: sparsity is 'much'; give a number"),
        (EdgePruningOptions, {"sparsity": float("nan")}, "sparsity is nan"),
        (EdgePruningOptions, {"warmup": 1.5}, "warmup is 1.5; give a number at least 0 and at most 1"),
        (EdgePruningOptions, {"steps": 0}, "edge-pruning: steps is 0; give a whole number from 1 up"),
        (EdgePruningOptions, {"steps": 2.5}, "steps is 2.5; give a whole number"),
        (EdgePruningOptions, {"batch": -1}, "batch is -1; give a whole number from 0 up"),
        (EdgePruningOptions, {"lr": 0}, "lr is 0; give a number above 0"),
        (EdgePruningOptions, {"start": "acdc"}, "start 'acdc' is unknown; choose one of none, eap, eap-ig"),
        (EdgePruningOptions, {"open": -1.0, "shut": 1.0}, "shut is 1, above open"),
        (EdgePruningOptions, {"nodes": 1}, "nodes is 1; give true or false"),
        (SubnetworkProbingOptions, {"regularisation": -1.0}, "regularisation is -1.0; give a number at least 0"),
        (SubnetworkProbingOptions, {"start": 1.0}, "start is 1.0; give a number above 0 and below 1"),
        (SubnetworkProbingOptions, {"lr": float("inf")}, "lr is inf"),
        (SubnetworkProbingOptions, {"steps": True}, "steps is True; give a whole number"),
    ],
)
def test_bad_options_are_told_in_one_line(options: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(PahqError) as error:
        options(**values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
