"""Batched chains in low precision against states made one after the other from their parents.

Both round the same numbers in the same way, but for the last digits of their FP32 sums: a number that lies between
two steps of a format may fall to either side, and moves the result by a step of one number's change. So nearly all
states agree to FP32's digits, and the rest to a part of what low precision itself adds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given

from chain_twin import ChainTwin, Edge, Values
from pahq.engine import Batch, Engine, Marks, arithmetic, chain
from pahq.method.sweep import Sweep, visits
from pahq.precision.policy import Policy, UnderTest, get_policy
from random_models import Case, cases, drawn

TABLES = ("bf16", "int8", "pahq", "e4m3", "linear=e5m2", "q=int8,k=bf16,v=e4m3,o=e5m2,mlp=bf16")
UNDER: tuple[UnderTest, ...] = ("none", "sender", "receiver", "both")
STATES = 9


def policy_of(case: Case) -> Policy:
    policy = get_policy(TABLES[case.seed % len(TABLES)], UNDER[case.seed // 8 % 4])
    return replace(policy, others_under_test=case.seed // 32 % 2 == 1)


def drawn_batch(case: Case) -> tuple[Marks, Batch]:
    """A sweep somewhere on its way, and its next tests with guesses; all drawn."""
    draw = np.random.default_rng(case.seed)
    sweep = Sweep(visits(case.graph, case.head_order == "ascending"), Marks.full(case.graph))
    start = sweep.copy()
    for _ in range(int(draw.integers(0, case.graph.n_edges))):
        edge, visit = sweep.peek(), sweep.at_visit
        if edge is None or case.graph.receivers[edge[0]].layer == 0:
            break
        sweep.decide(bool(draw.random() < 0.6))
        if sweep.at_visit != visit:  # a base state is made afresh between visits only
            start = sweep.copy()
    sweep = start if start.peek() is not None else Sweep(visits(case.graph), Marks.full(case.graph))
    future, edges, guesses = sweep.copy(), [], []
    while len(edges) < STATES and (edge := future.peek()) is not None:
        edges.append(edge)
        guesses.append(bool(draw.random() < 0.5))
        future.decide(guesses[-1])
    kept = np.array(guesses, dtype=bool)
    applied = np.tril(np.ones((len(edges), len(edges)), dtype=bool)) & ~kept
    np.fill_diagonal(applied, True)
    return sweep.marks, Batch(edges, applied, future.marks, spine=~kept)


def one_by_one(twin: ChainTwin, metric: str, marks: Marks, batch: Batch) -> list[float]:
    base, states, found = twin.base(marks.mask), dict[int, Values](), list[float]()
    for state, edge in enumerate(batch.candidates):
        parent = max((i for i in range(state) if batch.spine[i]), default=-1)
        removed: list[Edge] = [edge]
        mask = marks.mask.copy()
        for i in np.flatnonzero(batch.applied[state]):
            mask[batch.candidates[i]] = False
        states[state] = twin.child(base if parent < 0 else states[parent], mask, removed, edge[0])
        found.append(twin.metric(metric, states[state]))
    return found


def compare(count: int) -> tuple[list[float], list[float], Counter[str]]:
    """Engine less twin, and engine less FP32, of all states of so many cases, as parts of the metric's size."""
    off, rough, seen = list[float](), list[float](), Counter[str]()

    @drawn(count)
    @given(case=cases(torch.float32))
    def run(case: Case) -> None:
        policy = policy_of(case)
        marks, batch = drawn_batch(case)
        engine = Engine(case.model, case.prompts, case.graph, case.metric, case.ablation, screen=False, policy=policy)
        engine.rebase(marks)
        values, _ = engine.evaluate(batch)
        fp32 = engine.refine(list(range(len(values))))  # metric and slack
        twin = ChainTwin(case.model, case.prompts, case.graph, case.ablation, policy)
        expected = one_by_one(twin, case.metric, marks, batch)
        size = max(1.0, *map(abs, expected))
        off.extend(np.abs(values - expected) / size)
        rough.extend(abs(values[i] - fp32[i][0]) / size for i in range(len(values)))
        seen.update({policy.name, policy.under_test})

    run()
    return off, rough, seen


@pytest.mark.parametrize("few", [False, True], ids=["whole", "pieces"])
def test_states_agree(few: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if few:
        monkeypatch.setitem(arithmetic.PIECE_ELEMENTS, "cpu", 200 // torch.get_num_threads())
        monkeypatch.setattr(chain, "LOOP_ELEMENTS", 0)
    off, rough, seen = compare(60)
    near = float(np.mean(np.array(off) < 1e-5))
    with capsys.disabled():
        print(
            f"\nchains: {near:.1%} of {len(off)} states as one by one, the rest within {max(off):.2g} "
            f"(99 %: {np.quantile(off, 0.99):.2g}); low precision itself: median {np.median(rough):.2g}, "
            f"99 % {np.quantile(rough, 0.99):.2g}"
        )
    assert near > 0.9
    assert np.median(off) < 1e-6 < np.median(rough)
    assert max(off) < 0.3 * max(rough)
    assert len(seen) == len(TABLES) + len(UNDER)


def test_another_parent_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences against the state just before, on the spine or not, add up to the same sums but for the rounding."""
    monkeypatch.setattr(chain, "parents", lambda spine: list(range(-1, len(spine) - 1)))
    monkeypatch.setattr(chain, "last", lambda values, tip, spine: values[-1])
    monkeypatch.setattr(chain, "LOOP_ELEMENTS", 0)
    off, _, _ = compare(20)
    assert float(np.mean(np.array(off) < 1e-5)) < 0.9


def test_a_base_that_was_evaluated_in_fp32_is_fp32s() -> None:
    known, unknown = list[float](), list[float]()

    @drawn(30)
    @given(case=cases(torch.float32))
    def run(case: Case) -> None:
        marks, batch = drawn_batch(case)
        spine, policy = np.flatnonzero(batch.spine), policy_of(case)
        if not len(spine):
            return
        state, true = int(spine[-1]), 0.0
        for off, wanted in ((known, [state]), (unknown, [])):
            engine = Engine(
                case.model, case.prompts, case.graph, case.metric, case.ablation, screen=False, policy=policy
            )
            engine.rebase(marks)
            engine.evaluate(batch)
            true = engine.refine(wanted)[state][0] if wanted else true
            engine.commit(state)
            off.append(abs(engine.base_metric - true) / max(1.0, abs(true)))

    run()
    assert len(known) > 10
    assert max(known) < 1e-5 < max(unknown)
