"""Decisions of low-precision sweeps that must be FP32's: escalation, its margin, audits, and the check.

Where the FP32 effect lies within FP32's own rounding noise of the threshold either decision is right; what comes
after such an edge is not compared.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given

import tiny
from pahq.engine import Batch, engine
from pahq.engine.screen import Screen
from pahq.method import acdc, margin, measure
from pahq.method.acdc import Acdc, AcdcOptions, AcdcResult, Decision, Progress
from pahq.method.margin import Margin
from pahq.precision.policy import POLICIES, Policy, UnderTest, get_policy
from pahq.task.metrics import KlDiv, LogitsReadout
from pahq.task.prompts import last_position
from random_models import Case, cases, drawn
from test_engine_vs_oracle import threshold_for

TABLES = ("bf16", "int8", "pahq", "e4m3", "linear=e5m2", "attention=e5m2,mlp=int8")
UNDER: tuple[UnderTest, ...] = ("none", "sender", "receiver", "both")
NOISE = 1e-5
"""Of an FP32 effect in these models, generously."""


def sweep(case: Case, threshold: float, policy: Policy, exact: bool | None = None, check: bool = False) -> Acdc:
    options = case.acdc(threshold, policy=policy, exact=exact)
    memory = (1 << 30, 50_000)[case.seed % 2]
    return Acdc(case.model, case.prompts, options, memory_limit=memory, screen=False, check=check)


def policy_of(case: Case) -> Policy:
    return get_policy(TABLES[case.seed // 2 % len(TABLES)], UNDER[case.seed // 32 % 4])


def undecided(decision: Decision, threshold: float, absolute: bool) -> bool:
    """Whether FP32 itself cannot tell."""
    size = abs(decision.effect) if absolute else decision.effect
    return abs(size - threshold) <= NOISE * max(1.0, abs(decision.before))


def first_difference(ours: list[Decision], fp32: list[Decision]) -> int | None:
    for index, (a, b) in enumerate(zip(ours, fp32, strict=False)):
        if (a.row, a.column, a.kept) != (b.row, b.column, b.kept):
            return index
    assert len(ours) == len(fp32)
    return None


def agree(ours: AcdcResult, fp32: AcdcResult, threshold: float, absolute: bool) -> int:
    """Asserts that all decisions agree, and those taken in FP32 also in their effects; -> how many were compared."""
    doubtful = [i for i, d in enumerate(fp32.decisions) if undecided(d, threshold, absolute)]
    end = doubtful[0] if doubtful else len(fp32.decisions)
    assert first_difference(ours.decisions[:end], fp32.decisions[:end]) is None
    for a, b in zip(ours.decisions[:end], fp32.decisions[:end], strict=True):
        if a.refined:
            assert a.effect == pytest.approx(b.effect, abs=NOISE * max(1.0, abs(b.before)))
    if not doubtful:
        assert np.array_equal(ours.mask, fp32.mask)
    return end


def test_decisions_are_fp32s(capsys: pytest.CaptureFixture[str]) -> None:
    compared, refined, seen = 0, 0, Counter[str]()

    @drawn(90)
    @given(case=cases(torch.float32))
    def run(case: Case) -> None:
        nonlocal compared, refined
        threshold, policy = threshold_for(case), policy_of(case)
        result = sweep(case, threshold, policy, check=True).run()
        fp32 = sweep(case, threshold, POLICIES["fp32"][0]).run()
        compared += agree(result, fp32, threshold, case.absolute)
        figures = result.stats["precision"]["check"]
        assert figures["checked"] == len(result.decisions)
        outside = [d for d in figures["disagreements"] if abs(abs(d["fp32_effect"]) - threshold) > NOISE]
        assert not outside
        refined += sum(d.refined for d in result.decisions)
        seen.update({policy.name, policy.under_test, case.metric.partition(":")[0], case.ablation})
        seen.update({f"absolute {case.absolute}"})

    run()
    with capsys.disabled():
        print(f"\nexact: {compared} decisions agree with FP32's, {refined} of them taken in FP32")
    assert compared > 1500
    assert len(seen) == len(TABLES) + len(UNDER) + 7 + 3 + 2, seen


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("metric", ["kl_div", "logit_diff"])
def test_a_larger_model(name: str, metric: str) -> None:
    """Enough edges for the margin to be relied on: most decisions are low precision's own."""
    model, prompts = tiny.transformer(4, 4), tiny.RandomTask().prompts(tiny.transformer(4, 4), 4)
    threshold = {"kl_div": 0.003, "logit_diff": 0.01}[metric]
    fp32 = Acdc(model, prompts, AcdcOptions(threshold, metric)).run()
    result = Acdc(model, prompts, AcdcOptions(threshold, metric, policy=get_policy(name)), check=True).run()
    assert agree(result, fp32, threshold, False) > 100
    assert not [d for d in result.stats["precision"]["check"]["disagreements"] if not d["within_noise"]]
    if name in ("bf16", "int8", "pahq"):
        assert result.stats["precision"]["refined_share"] < 0.9


def test_without_a_margin_decisions_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same comparison finds errors where nothing is escalated; and the check finds the same ones."""
    for name in ("SAFETY", "NOISE"):
        monkeypatch.setattr(margin, name, 0.0)
    monkeypatch.setattr(margin, "ENOUGH", 0)
    monkeypatch.setattr(measure, "AUDIT", 1 << 60)
    found = compared = 0

    @drawn(30)
    @given(case=cases(torch.float32))
    def run(case: Case) -> None:
        nonlocal found, compared
        threshold = threshold_for(case)
        result = sweep(case, threshold, get_policy("linear=e5m2"), check=True).run()
        fp32 = sweep(case, threshold, POLICIES["fp32"][0]).run()
        different = first_difference(result.decisions, fp32.decisions)
        if any(undecided(d, threshold, case.absolute) for d in fp32.decisions[:different]):
            return
        reported = [d["order"] for d in result.stats["precision"]["check"]["disagreements"]]
        compared += 1
        if different is None:
            assert reported == []
            return
        if undecided(fp32.decisions[different], threshold, case.absolute):
            return
        assert reported[0] == different
        named = result.stats["precision"]["check"]["disagreements"][0]
        wrong = fp32.decisions[different]
        assert named["edge"] == result.graph.edge_name(wrong.row, wrong.column)
        assert named["fp32_effect"] == pytest.approx(wrong.effect, abs=NOISE * max(1.0, abs(wrong.before)))
        found += 1

    run()
    assert found >= 5, (found, compared)


def test_no_exact_escalates_nothing() -> None:
    model = tiny.transformer(3, 4)
    prompts = tiny.RandomTask().prompts(model, 4)
    result = Acdc(model, prompts, AcdcOptions(0.003, policy=get_policy("pahq"), exact=False)).run()
    assert not any(decision.refined for decision in result.decisions)
    assert result.stats["precision"]["refined"] == 0


def test_the_check_of_fp32_finds_nothing() -> None:
    model = tiny.transformer(3, 4)
    prompts = tiny.RandomTask().prompts(model, 4)
    figures = Acdc(model, prompts, AcdcOptions(0.003), check=True).run().stats["precision"]["check"]
    assert figures["checked"] > 100
    assert not [d for d in figures["disagreements"] if not d["within_noise"]]
    assert figures["largest_error"] < 1e-5


def test_the_check_finds_planted_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions turned round on the way to the check are reported, each one, and no others.

    (The last ones of batches: in the middle they would change what the next state is compared with.)
    """
    model = tiny.transformer(3, 4)
    prompts = tiny.RandomTask().prompts(model, 4)
    one = Acdc(model, prompts, AcdcOptions(0.003, policy=get_policy("bf16")), check=True)
    assert one.check is not None
    true, planted = one.check.batch, []

    def told(batch: Batch, decided: list[Decision], commit: int) -> None:
        last = decided[-1]
        if last.order % 3 == 0:
            planted.append(last.order)
            decided = [*decided[:-1], replace(last, kept=not last.kept)]
        true(batch, decided, commit)

    monkeypatch.setattr(one.check, "batch", told)
    figures = one.run().stats["precision"]["check"]
    assert len(planted) >= 3
    assert [d["order"] for d in figures["disagreements"]] == planted


@pytest.mark.parametrize("every", [3, 10])
def test_audits(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in so many decisions is measured in FP32 as well, however clear it is, and its error learned."""
    monkeypatch.setattr(measure, "AUDIT", every)
    monkeypatch.setattr(margin, "ENOUGH", 0)
    model = tiny.transformer(3, 4)
    prompts = tiny.RandomTask().prompts(model, 4)
    result = Acdc(model, prompts, AcdcOptions(0.003, policy=get_policy("bf16"))).run()
    audited = result.decisions[::every]
    assert all(decision.error is not None and decision.moved is not None for decision in audited)
    assert not all(decision.refined for decision in result.decisions)


@pytest.mark.parametrize("name", ["bf16", "pahq", "linear=e5m2"])
def test_resumed_runs_learn_the_same_margin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acdc, "CHECKPOINT_TESTS", 20)
    model = tiny.transformer(3, 4)
    prompts = tiny.RandomTask().prompts(model, 4)

    def run(replay: list[Decision]) -> tuple[AcdcResult, dict[str, object]]:
        one = Acdc(model, prompts, AcdcOptions(0.003, policy=get_policy(name)))
        found = one.run(replay)
        return found, {name: value for name, value in vars(one.measurer.margin).items() if name != "slope"}

    whole, learned = run([])
    checkpoints = [decision.order for decision in whole.decisions if decision.checkpoint]
    assert len(checkpoints) >= 3
    for last in checkpoints[::2]:
        again, relearned = run(whole.decisions[: last + 3])
        assert again.decisions == whole.decisions  # bit for bit
        assert relearned == learned
        assert again.stats["precision"]["largest_error"] == whole.stats["precision"]["largest_error"]


def test_margin_is_ready_after_enough_observations_of_the_kind() -> None:
    one = Margin()
    assert not one.ready("q")
    for _ in range(margin.ENOUGH - 1):
        one.observe("q", 1e-4, 0.1, 0.0)
    one.observe("q", 1e-4, 0.0, 0.0)  # did not move: tells nothing of how errors grow
    one.observe("q", 0.0, 0.1, 0.0)  # nothing was rounded: tells little
    one.observe("q", 1e-4, 0.1, 30.0)  # less than what rounding makes of a metric of 30: as little
    assert not one.ready("q")
    one.observe("q", 1e-4, 0.1, 0.0)
    assert one.ready("q")
    assert not one.ready("mlp")
    for _ in range(margin.ENOUGH_EXACT):
        one.observe("logits", 0.0, 0.1, 0.0)
    assert one.ready("logits")


def test_margin_covers_what_was_seen() -> None:
    one, draw = Margin(), np.random.default_rng(0)
    moved = draw.uniform(0.01, 1.0, 100)
    errors = moved * draw.uniform(0, 1e-2, 100)
    for error, length in zip(errors.tolist(), moved.tolist(), strict=True):
        one.observe("q", error, length, 0.0)
    margins = one.of(moved, 0.5)
    assert bool((margins >= errors).all())
    assert one.error == errors.max()
    assert bool((np.diff(one.of(np.sort(moved), 0.5)) >= 0).all())  # grows with the movement
    assert bool((one.of(moved, 100.0) > margins).all())  # and with the metric's own rounding noise


def test_margin_of_nothing_is_noise() -> None:
    one = Margin()
    assert one.of(np.zeros(3), 0.0).tolist() == [margin.NOISE] * 3
    assert one.of(np.zeros(1), -50.0).tolist() == pytest.approx([50 * margin.NOISE])


@pytest.mark.parametrize(("drift", "follows"), [(1, True), (1 << 60, False)])
def test_base_is_fp32s_again_after_some_removals(drift: int, follows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of low-precision products drift from FP32's; values that are put back in time do not."""
    monkeypatch.setattr(engine, "DRIFT", drift)
    model, prompts = tiny.transformer(4, 4), tiny.RandomTask().prompts(tiny.transformer(4, 4), 4)
    one = Acdc(model, prompts, AcdcOptions(0.003, policy=get_policy("pahq"), exact=False))
    fp32 = engine.Engine(model, prompts, one.graph)
    off: list[float] = []

    def compare(progress: Progress) -> None:
        removed = [(d.row, d.column) for d in progress.decisions if not d.kept]
        if removed:
            fp32.evaluate(Batch(removed, np.ones((1, len(removed)), dtype=bool), one.sweep.marks))
            fp32.commit(0)
        off.append(abs(one.engine.base_metric - fp32.base_metric))

    one.run(on_batch=compare)
    assert len(off) > 10
    assert (max(off) < 1e-6) == follows
    assert one.engine.exact_states > 0 or not follows


def test_what_is_measured_again_in_fp32_is_learned_from() -> None:
    model, prompts = tiny.transformer(4, 4), tiny.RandomTask().prompts(tiny.transformer(4, 4), 4)
    result = Acdc(model, prompts, AcdcOptions(0.003, policy=get_policy("int8"))).run()
    for decision in result.decisions:
        assert (decision.error is not None) >= decision.refined


def kl_div(clean: torch.Tensor) -> KlDiv:
    """For one prompt read at one position, where the clean model gives these logits [V]."""
    tokens = torch.zeros(1, 1, dtype=torch.long)
    return KlDiv(last_position(tokens, tokens, [[0]], [[1]]), clean[None, None])


def test_margin_grows_with_the_slope_of_the_metric() -> None:
    """Rounding that moves logits alike weighs more at a KL divergence of 4 than at 0.04: by the slope, sqrt(KL)."""
    slope = kl_div(torch.zeros(5)).slope
    one = Margin(slope)
    one.observe("q", 1e-3, 1.0, 0.04)
    still, moved = np.zeros(1), np.ones(1)
    early, late = (float(one.of(moved, kl)[0] - one.of(still, kl)[0]) for kl in (0.04, 4.0))
    assert early >= 1e-3
    assert late / early == pytest.approx(slope(4.0) / slope(0.04))
    assert late / early > 8


def test_slope_bounds_the_gradient_of_kl() -> None:
    """A step of the logits changes KL by no more than its length times the gradient's sum, sqrt(2 KL) at most."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(50, generator=generator, dtype=torch.float64)
    metric = kl_div(clean)
    for scale in (0.1, 1.0, 3.0):
        away = scale * torch.randn(50, generator=generator, dtype=torch.float64)
        at = (clean + away)[None, None].requires_grad_()
        value = metric(LogitsReadout(at))[0]
        (gradient,) = torch.autograd.grad(value, at)
        assert float(gradient.abs().sum()) <= np.sqrt(2) * metric.slope(float(value.detach()))


def test_no_more_is_measured_both_ways_than_a_kind_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole batches of a kind that is not known yet would be measured in FP32 as well."""
    model, prompts = tiny.transformer(4, 4), tiny.RandomTask().prompts(tiny.transformer(4, 4), 4)
    one = Acdc(model, prompts, AcdcOptions(0.003, policy=get_policy("bf16")))
    sizes: list[tuple[int, int]] = []
    evaluate = one.engine.evaluate

    def watched(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        row, _ = batch.candidates[0]
        sizes.append((one.measurer.lacks(one.graph.receivers[row].kind), batch.n_states))
        return evaluate(batch)

    monkeypatch.setattr(one.engine, "evaluate", watched)
    one.run()
    assert all(size <= lacks for lacks, size in sizes if lacks)
    assert any(lacks for lacks, _ in sizes[1:])
    assert max(size for lacks, size in sizes if not lacks) > 8


def test_what_the_screen_learns_is_free_of_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail's exp(mean) is at most its mean exp: what a screened sum misses is never negative but for rounding."""
    missed: list[float] = []
    observe = Screen.observe

    def noted(screen: Screen, what: float, estimate: float) -> None:
        missed.append(what)
        observe(screen, what, estimate)

    monkeypatch.setattr(Screen, "observe", noted)
    monkeypatch.setattr(engine, "MOST", 2.0)
    monkeypatch.setattr(acdc, "BASE_TOLERANCE", 1e-3)  # so that it learns often

    @drawn(40)
    @given(case=cases(torch.float32, vocab=400, metrics=("kl_div", "nll")))
    def run(case: Case) -> None:
        threshold = threshold_for(case)
        options = case.acdc(threshold, policy=get_policy(("int8", "e4m3")[case.seed % 2]))
        Acdc(case.model, case.prompts, options, screen=True).run()

    run()
    assert len(missed) > 20
    assert min(missed) > -1e-5
    assert max(missed) > 1e-5
