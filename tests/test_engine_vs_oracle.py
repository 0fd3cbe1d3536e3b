"""ACDC over the engine against ACDC over the oracle, on random models of every architecture feature.

In double precision every decision and effect has to agree. In single precision decisions whose effect is
within noise of the threshold are counted apart: there the two may part ways, and are compared no further.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given

import oracle
from pahq.engine import engine as engine_module
from pahq.method import acdc
from pahq.method.acdc import Acdc, AcdcOptions, Decision
from pahq.model.config import ModelConfig
from pahq.model.transformer import build
from pahq.task.prompts import last_position
from random_models import Case, cases, drawn, random_weights

CASES_DOUBLE, CASES_SINGLE = 220, 40


@dataclass
class Tally:
    """What was compared in one run of the tests."""

    cases: int = 0
    decisions: int = 0
    kept: int = 0
    wasted: int = 0
    within_noise: int = 0
    features: Counter[str] = field(default_factory=Counter)


def threshold_for(case: Case) -> float:
    """A part of the change of the metric when everything is ablated, but nothing that is lost in rounding."""
    graph, model, prompts = case.graph, case.model, case.prompts
    nothing = np.zeros(graph.shape, dtype=bool)
    clean = oracle.forward(model, graph, prompts.clean).logits
    ablated = oracle.circuit_logits(model, prompts, graph, nothing, case.ablation, set(graph.receivers))
    values = [oracle.metric_value(case.metric, logits, clean, prompts) for logits in (clean, ablated)]
    # an odd number: effects such as 0 or a whole difference of two logits must not fall on the threshold
    return max(case.fraction * abs(values[1] - values[0]), 1e-4) * 1.000123


def sequential(case: Case, threshold: float) -> oracle.Sweep:
    return oracle.acdc(
        case.model,
        case.prompts,
        case.graph,
        threshold,
        case.metric,
        case.ablation,
        case.absolute,
        case.head_order,
        case.sender_order,
    )


def engine(case: Case, threshold: float, screen: bool = False) -> Acdc:
    """Under bounds on states and memory that make short and long batches, drawn with the case."""
    options = case.acdc(threshold)
    memory = (1 << 30, 50_000)[case.seed % 2]
    return Acdc(
        case.model, case.prompts, options, memory_limit=memory, max_states=1 + case.seed // 2 % 32, screen=screen
    )


def compare(decisions: list[Decision], expected: list[oracle.Step], atol: float) -> None:
    assert [(d.row, d.column, d.kept) for d in decisions] == [(e.row, e.column, e.kept) for e in expected]
    assert [d.order for d in decisions] == list(range(len(expected)))
    for name in ("before", "after", "effect"):
        ours, theirs = ([getattr(d, name) for d in steps] for steps in (decisions, expected))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=name)


def features_of(case: Case) -> set[str]:
    cfg, graph, prompts = case.model.config, case.graph, case.prompts
    flags = {
        "attention-only": not cfg.d_mlp,
        "grouped": cfg.group_size > 1,
        "gated": cfg.gated and cfg.d_mlp > 0,
        "parallel": cfg.parallel and cfg.d_mlp > 0,
        "bidirectional": not cfg.causal,
        "qk_norm": cfg.qk_norm,
        "window": cfg.window is not None,
        "split_pos": graph.split_pos,
        "joint qkv": not graph.split_qkv,
        "no direct edges": not graph.direct_edges,
        "absolute": case.absolute,
        "one prompt": len(prompts) == 1,
        "one token": prompts.clean.shape[1] == 1,
        "padded": prompts.pad is not None,
        "several positions": prompts.read.shape[1] > 1,
        "common prefix": bool((prompts.clean == prompts.corrupt)[:, 0].all()),
    }
    named = {cfg.positions + " positions", cfg.norm + " norm", "act " + cfg.act, case.metric, case.ablation}
    return named | {case.head_order, case.sender_order} | {name for name, on in flags.items() if on}


def test_double_precision(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally()

    @drawn(CASES_DOUBLE)
    @given(case=cases())
    def run(case: Case) -> None:
        threshold = threshold_for(case)
        expected, result = sequential(case, threshold), engine(case, threshold).run()
        compare(result.decisions, expected.decisions, atol=1e-8)
        assert np.array_equal(result.mask, expected.mask)
        assert np.array_equal(result.order, expected.order)
        np.testing.assert_allclose(result.effects, expected.effects, rtol=0, atol=1e-8)
        assert result.metric == pytest.approx(expected.metric, abs=1e-8)
        tally.cases += 1
        tally.decisions += len(expected.decisions)
        tally.kept += sum(d.kept for d in expected.decisions)
        tally.wasted += result.stats["wasted"]
        tally.features.update(features_of(case))

    run()
    with capsys.disabled():
        print(f"\nengine against oracle: {tally.decisions} of {tally.decisions} decisions agree in {tally.cases} cases")
    assert tally.cases >= 200
    assert 0.05 < tally.kept / tally.decisions < 0.95  # not trivial
    assert tally.wasted  # wrong guesses came up, and were mended
    assert len(tally.features) == 7 + 4 + 3 + 8 + 3 + 4 + 16, sorted(tally.features)
    assert min(tally.features.values()) >= 5, tally.features.most_common()[-3:]


def test_single_precision(capsys: pytest.CaptureFixture[str]) -> None:
    tally, noise = Tally(), 1e-4

    @drawn(CASES_SINGLE)
    @given(case=cases(torch.float32))
    def run(case: Case) -> None:
        threshold = threshold_for(case)
        expected, result = sequential(case, threshold), engine(case, threshold).run()
        sizes = [abs(d.effect) if case.absolute else d.effect for d in expected.decisions]
        close = [abs(size - threshold) < noise for size in sizes]
        first = close.index(True) if True in close else len(close)
        compare(result.decisions[:first], expected.decisions[:first], atol=noise)
        tally.cases += 1
        tally.decisions += first
        tally.within_noise += first < len(close)

    run()
    with capsys.disabled():
        print(
            f"\nengine against oracle, single precision: {tally.decisions} decisions agree in {tally.cases} cases; "
            f"{tally.within_noise} cases end early at an effect within {noise:g} of the threshold"
        )
    assert tally.decisions > 10 * CASES_SINGLE


def test_checkpoints_and_resumed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acdc, "CHECKPOINT_TESTS", 7)
    resumed = 0

    @drawn(60)
    @given(case=cases())
    def run(case: Case) -> None:
        nonlocal resumed
        threshold = threshold_for(case)
        whole = engine(case, threshold).run()
        compare(whole.decisions, sequential(case, threshold).decisions, atol=1e-8)
        journal = whole.decisions[: case.seed % (len(whole.decisions) + 1)]
        again = engine(case, threshold).run(replay=journal)
        assert again.decisions == whole.decisions  # bit for bit
        assert np.array_equal(again.mask, whole.mask)
        assert again.metric == whole.metric
        resumed += any(decision.checkpoint for decision in journal)

    run()
    assert resumed >= 10


def test_resumed_runs_go_on_in_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums round differently in batches of another size: what sizes them must not remember how a run began."""
    monkeypatch.setattr(acdc, "CHECKPOINT_TESTS", 40)
    monkeypatch.setattr(engine_module, "LAUNCH_FLOPS", {"cpu": 1e5})  # so that what a state costs has a say
    cfg = ModelConfig(4, 6, 6, 32, 8, 64, 50, 50, 8)
    model = build(cfg, random_weights(cfg, 0, set(), torch.float32))
    draw = torch.Generator().manual_seed(1)
    clean, corrupt = (torch.randint(50, (8, 8), generator=draw) for _ in range(2))
    prompts = last_position(clean, corrupt, [[]] * 8, [[]] * 8)

    def sweep(replay: list[Decision]) -> tuple[list[Decision], list[int]]:
        sizes: list[int] = []
        result = Acdc(model, prompts, AcdcOptions(0.003)).run(replay, lambda now: sizes.append(len(now.decisions)))
        return result.decisions, sizes

    decisions, sizes = sweep([])
    checkpoints = [decision.order for decision in decisions if decision.checkpoint]
    assert len(checkpoints) >= 4
    for last in checkpoints:
        again, later = sweep(decisions[: last + 1])
        assert later == sizes[len(sizes) - len(later) :]
        assert again == decisions  # bit for bit


@pytest.mark.parametrize("always", [True, False])
def test_screened_vocabulary(always: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Likely tokens in full and the tail estimated: effects lose digits, decisions do not change.

    always: the screen stays on where it does not pay, as it often does not with these small vocabularies.
    """
    if always:
        monkeypatch.setattr("pahq.engine.engine.MOST", 2.0)
    tally, errors, states, escalated = Tally(), [], 0, 0

    @drawn(80 if always else 40)
    @given(case=cases(vocab=400, metrics=("kl_div", "nll", "match_nll", "greaterthan")))
    def run(case: Case) -> None:
        nonlocal states, escalated
        threshold = threshold_for(case)
        expected, sweep = sequential(case, threshold), engine(case, threshold, screen=True)
        result = sweep.run()
        ours, theirs = ([(d.row, d.column, d.kept) for d in r.decisions] for r in (result, expected))
        assert ours == theirs
        errors.append(max(abs(d.effect - e.effect) for d, e in zip(result.decisions, expected.decisions, strict=True)))
        assert result.metric == pytest.approx(expected.metric, abs=1e-8)  # measured in full at the end
        tally.cases += 1
        tally.decisions += len(expected.decisions)
        states += result.stats["states"]
        escalated += sweep.engine.escalated

    run()
    with capsys.disabled():
        print(
            f"\nscreened vocabulary: {tally.decisions} decisions agree in {tally.cases} cases, {escalated} of {states} "
            f"states evaluated in full; error of effects: median {np.median(errors):.1g}, at most {max(errors):.1g}"
        )
    assert 0 < escalated < states
    assert (np.median(errors) if always else max(errors)) > 1e-9  # the screen was at work


@pytest.mark.parametrize("screen", [False, True])
@pytest.mark.parametrize(("gain", "offset"), [(5.0, 0.0), (60.0, 0.0), (1.0, 10.0), (1.0, 30.0)])
def test_far_states(gain: float, offset: float, screen: bool) -> None:
    """Single precision where logits of neighbouring states lie further apart than exp has range, or digits."""
    cfg = ModelConfig(2, 2, 1, 10, 4, 7, 400, 400, 8, norm="none" if offset else "layer")
    weights = random_weights(cfg, 0, set())
    weights["unembed.W_U"] = weights["unembed.W_U"] * gain + offset
    double = build(cfg, weights)
    draw = torch.Generator().manual_seed(1)
    clean, corrupt = (torch.randint(400, (3, 5), generator=draw) for _ in range(2))
    prompts = last_position(clean, corrupt, [[]] * 3, [[]] * 3)
    sweep = Acdc(double.to(dtype=torch.float32), prompts, AcdcOptions(0.05), screen=screen)
    result = sweep.run()
    expected = oracle.acdc(double, prompts, sweep.graph, 0.05, "kl_div", "resample", False, "descending", "latest")
    compare(result.decisions, expected.decisions, atol=5e-4)
