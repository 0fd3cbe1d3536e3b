"""Chains of differences against the plain algorithm: with exact products both must take the same decisions.

The products of differences are forced to FP32 (or FP64), so that only the bookkeeping of chains is left: parents,
tips, sums, direct edges, heads under test, the base state that goes on from a batch to the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from pahq.engine import Marks, arithmetic, chain
from pahq.method import acdc
from pahq.method.acdc import Acdc
from pahq.precision import mixed
from pahq.precision.policy import Policy, UnderTest, get_policy
from random_models import Case, cases, drawn
from test_engine_vs_oracle import compare, features_of, sequential, threshold_for

UNDER: tuple[UnderTest, ...] = ("none", "sender", "receiver", "both")


@dataclass(frozen=True)
class Forced(Policy):
    """A policy of FP32 products that are made of differences all the same."""

    @property
    def is_fp32(self) -> bool:
        return False

    def require(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Double precision will do, too."""


def chained(case: Case, threshold: float, exact: bool = False, screen: bool = False) -> Acdc:
    """As ``test_engine_vs_oracle.engine``, over chains; which parts are under test is drawn with the case."""
    policy = Forced("forced", under_test=UNDER[case.seed // 64 % 4], others_under_test=case.seed // 256 % 2 == 1)
    assert policy.differences
    options = case.acdc(threshold, policy=policy, exact=exact)
    memory = (1 << 30, 50_000)[case.seed % 2]
    return Acdc(
        case.model, case.prompts, options, memory_limit=memory, max_states=1 + case.seed // 2 % 32, screen=screen
    )


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets rows in FP64 be put together, where the engine insists on FP32."""

    def place(low: Tensor, slots: slice, high: Tensor) -> Tensor:
        low[slots] = high
        return low

    monkeypatch.setattr(mixed, "assemble", place)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("few", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
def test_double_precision(few: bool, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """few: a node's states are worked on a few at a time, and added one by one."""
    features: Counter[str] = Counter()
    decisions = 0
    if few:
        monkeypatch.setitem(arithmetic.PIECE_ELEMENTS, "cpu", 200 // torch.get_num_threads())
        monkeypatch.setattr(chain, "LOOP_ELEMENTS", 0)

    @drawn(20 if exact else 30)
    @given(case=cases())
    def run(case: Case) -> None:
        nonlocal decisions
        threshold = threshold_for(case)
        expected, result = sequential(case, threshold), chained(case, threshold, exact).run()
        compare(result.decisions, expected.decisions, atol=1e-8)
        assert np.array_equal(result.mask, expected.mask)
        assert result.metric == pytest.approx(expected.metric, abs=1e-8)
        features.update(features_of(case))
        decisions += len(expected.decisions)

    run()
    assert decisions > 400
    assert {"grouped", "gated", "parallel", "qk_norm", "joint qkv", "split_pos", "zero", "mean"} <= set(features)


def test_single_precision() -> None:
    noise, decisions = 1e-4, 0

    @drawn(30)
    @given(case=cases(torch.float32))
    def run(case: Case) -> None:
        nonlocal decisions
        threshold = threshold_for(case)
        expected, result = sequential(case, threshold), chained(case, threshold).run()
        sizes = [abs(d.effect) if case.absolute else d.effect for d in expected.decisions]
        close = [abs(size - threshold) < noise for size in sizes]
        first = close.index(True) if True in close else len(close)
        compare(result.decisions[:first], expected.decisions[:first], atol=noise)
        decisions += first

    run()
    assert decisions > 300


@pytest.mark.usefixtures("double")
def test_large_vocabulary_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over likely tokens, of chained logits; runs that are taken up again."""
    monkeypatch.setattr(acdc, "CHECKPOINT_TESTS", 7)
    monkeypatch.setattr("pahq.engine.engine.MOST", 2.0)
    screened = 0

    @drawn(25)
    @given(case=cases(vocab=400, metrics=("kl_div", "nll", "match_nll", "greaterthan")))
    def run(case: Case) -> None:
        nonlocal screened
        threshold = threshold_for(case)
        expected, sweep = sequential(case, threshold), chained(case, threshold, screen=True)
        result = sweep.run()
        ours, theirs = ([(d.row, d.column, d.kept) for d in r.decisions] for r in (result, expected))
        assert ours == theirs
        again = chained(case, threshold, screen=True).run(replay=result.decisions[: case.seed % len(ours)])
        assert again.decisions == result.decisions
        screened += sweep.engine.escalated < result.stats["states"]

    run()
    assert screened


def test_products_kept_of_fp32_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where FP32 took the base's place, what is known of its MLPs' products is what its inputs give."""
    monkeypatch.setattr(acdc, "CHECKPOINT_TESTS", 20)
    monkeypatch.setattr("pahq.engine.engine.DRIFT", 3)
    found = {"settled": 0, "rebased": 0}

    @drawn(60)
    @given(case=cases(torch.float32))
    def run(case: Case) -> None:
        sweep = Acdc(case.model, case.prompts, case.acdc(threshold_for(case), policy=get_policy("int8")))
        engine = sweep.engine

        def compared(name: str, put: Callable[[Marks], None]) -> Callable[[Marks], None]:
            def then(marks: Marks) -> None:
                put(marks)
                state = engine.state
                changed = {row for kind, row, _ in state.changed if kind == "x"}
                for (kind, row, _, level), products in list(state._linear.items()):
                    block = case.model.blocks[case.graph.receivers[row].layer]
                    if kind != "mlp" or row not in changed:
                        continue
                    assert block.mlp is not None
                    assert block.ln2 is not None
                    rows = block.ln2(state.input(row, level)).flatten(0, -2)
                    for got, wanted in zip(products, block.mlp.hidden(rows), strict=False):
                        assert wanted is not None
                        assert torch.equal(got.flatten(0, -2), wanted)
                    found[name] += 1
                assert not engine._lag.state._linear

            return then

        monkeypatch.setattr(engine, "_settle", compared("settled", engine._settle))
        monkeypatch.setattr(engine, "rebase", compared("rebased", engine.rebase))
        sweep.run()

    run()
    assert min(found.values()) > 5
