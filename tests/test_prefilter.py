"""ACDC over the edges that a method's scores leave: every decision against whole passes of the oracle."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given

import oracle
from pahq.engine.engine import Engine
from pahq.engine.full import patched_logits
from pahq.engine.marks import Marks
from pahq.evaluation.circuit import Circuit
from pahq.method.acdc import Acdc
from pahq.method.select import top
from random_models import Case, cases, drawn
from test_engine_vs_oracle import compare, threshold_for
from test_exact import agree, policy_of


def start_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random scores and the edges that they leave: some of every graph, at times all or a path or two."""
    draw = np.random.default_rng(case.seed)
    values = draw.normal(size=case.graph.shape)
    share = draw.choice([0.2, 0.5, 0.8, 1.0])
    return values, top(case.graph, values, max(1, round(share * case.graph.n_edges)))


def test_decisions_are_those_of_whole_passes() -> None:
    tests = left = 0

    @drawn(70)
    @given(case=cases())
    def run(case: Case) -> None:
        nonlocal tests, left
        values, start = start_of(case)
        strength = values if case.seed % 3 else None
        threshold = threshold_for(case)
        memory = (1 << 30, 50_000)[case.seed % 2]
        acdc = Acdc(
            case.model,
            case.prompts,
            case.acdc(threshold),
            memory_limit=memory,
            max_states=1 + case.seed // 2 % 32,
            screen=False,
            start=start,
            strength=strength,
        )
        result = acdc.run()
        slow = oracle.acdc(
            case.model,
            case.prompts,
            case.graph,
            threshold,
            case.metric,
            case.ablation,
            case.absolute,
            case.head_order,
            case.sender_order,
            start,
            strength,
        )
        compare(result.decisions, slow.decisions, 1e-8)
        assert np.array_equal(result.mask, slow.mask)
        assert not (result.mask & ~start).any()
        tests, left = tests + len(result.decisions), left + int(result.mask.sum())

    run()
    assert tests > 400
    assert left > 100


@drawn(30)
@given(case=cases())
def test_the_base_starts_as_the_circuit(case: Case) -> None:
    _, start = start_of(case)
    engine = Engine(case.model, case.prompts, case.graph, case.metric, case.ablation, screen=False, start=start)
    graph = case.graph
    clean = oracle.forward(case.model, graph, case.prompts.clean).logits
    logits = oracle.circuit_logits(case.model, case.prompts, graph, start, case.ablation, set(graph.receivers))
    expected = oracle.metric_value(case.metric, logits, clean, case.prompts)
    assert abs(engine.base_metric - expected) < 1e-9
    engine.rebase(Marks.full(graph, start))
    assert abs(engine.base_metric - expected) < 1e-9


@drawn(12)
@given(case=cases(torch.float32))
def test_low_precision_decides_as_fp32(case: Case) -> None:
    _, start = start_of(case)
    threshold = threshold_for(case)
    options = case.acdc(threshold), case.acdc(threshold, policy=policy_of(case))
    results = [Acdc(case.model, case.prompts, one, screen=False, start=start, check=True).run() for one in options]
    agree(results[1], results[0], threshold, case.absolute)


def test_all_edges_is_an_ordinary_sweep() -> None:
    """To rounding: sums of what is present, instead of the ordinary residual stream."""

    @drawn(12)
    @given(case=cases())
    def run(case: Case) -> None:
        threshold = threshold_for(case)
        plain = Acdc(case.model, case.prompts, case.acdc(threshold), screen=False).run()
        given = Acdc(case.model, case.prompts, case.acdc(threshold), screen=False, start=case.graph.edges.copy()).run()
        assert [(d.row, d.column, d.kept) for d in given.decisions] == [
            (d.row, d.column, d.kept) for d in plain.decisions
        ]
        np.testing.assert_allclose(given.effects, plain.effects, rtol=0, atol=1e-8)

    run()


def test_the_circuit_alone_gives_the_last_metric() -> None:
    @drawn(12)
    @given(case=cases())
    def run(case: Case) -> None:
        _, start = start_of(case)
        found = Acdc(case.model, case.prompts, case.acdc(threshold_for(case)), screen=False, start=start).run()
        circuit = Circuit(found.graph, found.mask, found.effects, found.order)
        logits = patched_logits(case.model, case.prompts, circuit.graph, circuit.mask, case.ablation)
        everywhere = oracle.circuit_logits(
            case.model, case.prompts, case.graph, found.mask, case.ablation, set(case.graph.receivers)
        )
        at = everywhere[torch.arange(len(case.prompts))[:, None], case.prompts.read]
        torch.testing.assert_close(logits, at, rtol=0, atol=1e-9)
        clean = oracle.forward(case.model, case.graph, case.prompts.clean).logits
        assert abs(found.metric - oracle.metric_value(case.metric, everywhere, clean, case.prompts)) < 1e-8

    run()
