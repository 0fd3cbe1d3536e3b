"""The differentiable pass: its values against whole passes, its gradients against differences and the oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import oracle
from pahq.engine.full import patched_logits
from pahq.engine.gradients import Gradients, Point, held, interpolated, plain
from pahq.engine.reference import reference_run
from pahq.engine.soft import SoftPass
from pahq.errors import PahqError
from pahq.graph import Graph, Sender
from pahq.model.transformer import build
from pahq.precision.cpu import CpuScheduler
from pahq.precision.streamed import streamed
from pahq.task.metrics import LogitsReadout, get_metric
from pahq.task.score import read_logits
from random_models import Case, cases, drawn
from tiny import RandomTask, transformer


def gradients_of(case: Case, **more: Any) -> Gradients:
    return Gradients(case.model, case.prompts, case.graph, case.metric, case.ablation, **more)


def soft_of(case: Case) -> SoftPass:
    reference = reference_run(case.model, case.prompts, case.ablation, case.graph.split_pos)
    return SoftPass(case.model, case.prompts, case.graph, reference)


def random_gates(case: Case) -> Tensor:
    draw = torch.Generator().manual_seed(case.seed)
    gates = 0.2 + 0.8 * torch.rand(case.graph.shape, generator=draw, dtype=torch.float64)
    return gates.where(torch.from_numpy(case.graph.edges.copy()), 1.0)


def check_slope(case: Case, gradients: Gradients, gates: Tensor, point: Point) -> None:
    """The gradient along some edges, and along all at once, equals the metric's central difference."""
    edges = torch.from_numpy(case.graph.edges.copy())
    _, gradient = gradients.gradient(gates, point)
    assert not gradient[~edges].any()
    draw = torch.Generator().manual_seed(case.seed)
    everything = torch.randn(case.graph.shape, generator=draw, dtype=torch.float64).where(edges, 0.0)
    chosen = edges.nonzero()[torch.randperm(int(edges.sum()), generator=draw)[:4]]
    singles = [torch.zeros_like(everything).index_put((row, column), everything.new_ones(())) for row, column in chosen]
    for along in [everything / everything.norm(), *singles]:
        step = 1e-5
        ends = [gradients.value(gates + sign * step * along, point) for sign in (1, -1)]
        difference = (ends[0] - ends[1]) / (2 * step)
        assert difference == pytest.approx(float((gradient * along).sum()), abs=1e-5 * float(gradient.norm()) + 1e-8)


@drawn(60)
@given(case=cases())
def test_gates_of_a_circuit_give_its_logits(case: Case) -> None:
    graph, rng = case.graph, np.random.default_rng(case.seed)
    mask = graph.edges & (rng.random(graph.shape) < rng.choice([0.0, 0.1, 0.5, 0.9, 1.0]))
    soft, gradients = soft_of(case), gradients_of(case)
    expected = patched_logits(case.model, case.prompts, graph, mask, case.ablation)
    torch.testing.assert_close(soft.logits(gradients.gates(mask))[0], expected, rtol=0, atol=1e-9)
    measured = float(get_metric(case.metric, case.prompts, gradients.clean)(LogitsReadout(expected))[0])
    assert gradients.value(gradients.gates(mask)) == pytest.approx(measured, abs=1e-9)


@drawn(80)
@given(case=cases())
def test_gradients_are_the_slope_of_the_metric(case: Case) -> None:
    check_slope(case, gradients_of(case), random_gates(case), plain)


@drawn(40)
@given(case=cases())
def test_values_that_are_given_let_no_gradient_through(case: Case) -> None:
    """Senders that are held: as a whole pass without their edges at 0, and a slope at any place between."""
    graph = case.graph
    rng = np.random.default_rng(case.seed)
    columns = np.flatnonzero(rng.random(len(graph.senders)) < 0.3).tolist()
    mask = graph.edges.copy()
    mask[:, columns] = False
    soft = soft_of(case)
    zero = torch.zeros(*case.prompts.clean.shape, case.model.config.d_model, dtype=torch.float64)
    found, _ = soft.logits(torch.ones(graph.shape, dtype=torch.float64), held=dict.fromkeys(columns, zero))
    expected = patched_logits(case.model, case.prompts, graph, mask, case.ablation)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)

    def point(soft: SoftPass, gates: Tensor) -> Any:
        return soft.logits(gates, held={column: 0.7 * soft.clean().now[column] for column in columns})

    check_slope(case, gradients_of(case), random_gates(case), point)


@drawn(15)
@given(case=cases())
def test_pieces_of_the_examples_give_the_same(case: Case) -> None:
    gates, groups = random_gates(case), [[0]]
    whole, pieces = gradients_of(case), gradients_of(case, memory_limit=1)
    assert (len(whole.pieces), len(pieces.pieces)) == (1, len(case.prompts))
    for point in (plain, interpolated(0.4), held(groups[0], 0.5)):
        value, gradient = whole.gradient(gates, point)
        kept: list[Tensor] = []
        again, summed = pieces.gradient(gates, point, after=lambda count, total: kept.append(total.clone()))  # noqa: B023
        assert again == pytest.approx(value, abs=1e-10)
        torch.testing.assert_close(summed, gradient, rtol=1e-9, atol=1e-9 * float(gradient.norm()) + 1e-12)
        half = len(kept) // 2
        resumed = pieces.gradient(gates, point, done=half, partial=(torch.zeros_like(gates), *kept)[half])
        assert resumed[0] == again
        assert torch.equal(resumed[1], summed)
        with torch.no_grad():
            assert torch.equal(pieces.gradient(gates, point)[1], summed)


@drawn(20)
@given(case=cases())
def test_a_part_is_those_examples_alone(case: Case) -> None:
    chosen = list(range(0, len(case.prompts), 2))
    part = gradients_of(case).part(chosen)
    if case.ablation == "mean":  # whose means stay those of all examples
        assert len(part.prompts) == len(chosen)
        return
    alone = Gradients(case.model, case.prompts[chosen], case.graph, case.metric, case.ablation)
    mine, theirs = part.gradient(random_gates(case)), alone.gradient(random_gates(case))
    assert mine[0] == pytest.approx(theirs[0], abs=1e-10)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-9, atol=1e-10)


@drawn(40)
@given(case=cases())
def test_open_gates_have_a_shorter_way_to_the_same(case: Case) -> None:
    """Logits, gates' gradient, and the senders' own, with and without the sum that all gates at 1 allow."""
    soft, gates = soft_of(case), torch.ones(case.graph.shape, dtype=torch.float64)
    found = []
    for whole in (False, True, None):
        leaf = gates.clone().requires_grad_()
        logits, senders = soft.logits(leaf, 0.6, soft.clean() if case.absolute else None, whole=whole)
        draw = torch.Generator().manual_seed(case.seed)
        logits.backward(torch.randn(logits.shape, generator=draw, dtype=torch.float64))
        assert leaf.grad is not None
        assert senders.gradient is not None
        found.append((logits.detach(), leaf.grad, senders.now, senders.gradient))
    for slow, fast, chosen in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-9 * float(slow.norm()) + 1e-12)
        assert torch.equal(fast, chosen)


def moved_model(case: Case, alpha: float) -> tuple[Any, Any, Any]:
    """A model, tokens for it and its graph, whose embeddings stand between the reference run's and the clean ones."""
    model, prompts, graph = case.model, case.prompts, case.graph
    reference = oracle.reference_run(model, graph, prompts, case.ablation)
    clean = oracle.forward(model, graph, prompts.clean)

    def mixed(kind: Any) -> Tensor:
        now, then = clean.senders[Sender(kind, -1)], reference.senders[Sender(kind, -1)]
        return then + alpha * (now - then)

    weights, count = dict(model.weights), prompts.clean.numel()
    weights["embed.W_E"] = mixed("embed").expand(*prompts.clean.shape, -1).flatten(0, 1)
    if model.config.positions == "learned":
        table = torch.zeros_like(weights["pos_embed.W_pos"])
        if graph.split_pos:
            table[: prompts.clean.shape[1]] = mixed("pos_embed")[0]
        weights["pos_embed.W_pos"] = table
    moved = build(dataclasses.replace(model.config, d_vocab=count), weights)
    return moved, torch.arange(count).view(prompts.clean.shape), (clean, reference)


def slow_scores(case: Case, alpha: float) -> Tensor:
    """Gradients at every receiver's input of the oracle's pass, times the clean run's differences."""
    graph, prompts = case.graph, case.prompts
    moved, tokens, (clean, reference) = moved_model(case, alpha)
    leaves = {
        receiver: value.expand(*tokens.shape, -1).clone().requires_grad_()
        for receiver, value in reference.inputs.items()
    }
    patch = oracle.Patch(graph.edges, set(graph.receivers), dataclasses.replace(reference, inputs=leaves))
    forward: Any = oracle.forward
    run = forward.__wrapped__(moved, graph, tokens, patch)
    for value in run.computed.values():
        value.retain_grad()
    logits = run.logits[torch.arange(len(prompts))[:, None], prompts.read]
    get_metric(case.metric, prompts, read_logits(case.model, prompts))(LogitsReadout(logits)).backward()
    out = torch.zeros(graph.shape, dtype=torch.float64)
    for row, receiver in enumerate(graph.receivers):
        grad = leaves[receiver].grad
        for column in range(graph.n_upstream(receiver)):
            sender = graph.senders[column]
            if grad is not None:
                out[row, column] = (grad * (clean.senders[sender] - reference.senders[sender])).sum()
        if not graph.edges[row, graph.direct]:
            continue
        for key, value in run.computed.items():
            layer, which, index = key
            head = index if which == "q" else index * graph.config.group_size
            if oracle.receiver_of(graph, layer, which, head) == receiver:
                out[row, graph.direct] += (value.grad * (clean.computed[key] - reference.computed[key])).sum()
    return out


@drawn(60)
@given(case=cases(metrics=("logit_diff", "greaterthan", "nll", "kl_div", "l2", "docstring")))
def test_gradients_on_the_way_to_the_clean_run_agree_with_the_oracle(case: Case) -> None:
    alpha = np.random.default_rng(case.seed).choice([0.0, 0.3, 1.0])
    gradients = gradients_of(case)
    _, found = gradients.gradient(gradients.ones(), interpolated(float(alpha)))
    expected = slow_scores(case, float(alpha))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * float(expected.norm()) + 1e-10)


def test_weights_that_come_and_go_are_refused() -> None:
    model = transformer(1, 2)
    moving = streamed(model, "cpu", CpuScheduler(torch.device("cpu"), ()), copy=True)
    prompts = RandomTask().prompts(model, 2)
    with pytest.raises(PahqError, match="stay in host memory cannot be differentiated"):
        next(Gradients(moving, prompts, Graph(model.config), "kl_div").passes())
