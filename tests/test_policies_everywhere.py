"""Every policy with every metric, ablation and architecture: runs end, with finite numbers, the same ones each time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given

from pahq.method import acdc
from pahq.method.acdc import Acdc
from pahq.precision.policy import POLICIES, UnderTest, get_policy
from random_models import Case, cases, drawn
from test_engine_vs_oracle import features_of, threshold_for

SPECS = [*POLICIES, "q=int8,k=bf16,o=e5m2", "values:mlp=e5m2,softmax=bf16,residual=bf16"]
UNDER = get_args(UnderTest)


def sweep(case: Case, spec: str, threshold: float) -> Acdc:
    policy = get_policy(spec)
    if not policy.is_fp32:
        policy = replace(policy, under_test=UNDER[case.seed // 4 % 4], others_under_test=case.seed // 16 % 2 == 1)
    options = case.acdc(threshold, policy=policy)
    memory = (1 << 30, 50_000)[case.seed % 2]
    return Acdc(case.model, case.prompts, options, memory, screen=case.seed // 2 % 2 == 1)


def test_runs_end_and_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case under one policy after the other in turn; the second run is taken up somewhere in the first."""
    monkeypatch.setattr(acdc, "CHECKPOINT_TESTS", 20)
    features: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    resumed = 0

    @drawn(12 * len(SPECS))
    @given(case=cases(torch.float32))
    def run(case: Case) -> None:
        nonlocal resumed
        threshold, spec = threshold_for(case), SPECS[runs.total() % len(SPECS)]
        result = sweep(case, spec, threshold).run()
        assert np.isfinite([d.after for d in result.decisions]).all()
        assert np.isfinite(result.metric)
        assert set(result.order[result.order >= 0].tolist()) == set(range(len(result.decisions)))
        journal = result.decisions[: case.seed % (len(result.decisions) + 1)]
        again = sweep(case, spec, threshold).run(journal)
        assert again.decisions == result.decisions  # bit for bit
        assert np.array_equal(again.mask, result.mask)
        assert np.array_equal(again.effects, result.effects, equal_nan=True)
        assert again.metric == result.metric
        resumed += any(decision.checkpoint for decision in journal)
        features.update(features_of(case))
        runs[spec] += 1

    run()
    assert min(runs[spec] for spec in SPECS) >= 10
    assert resumed >= 10
    assert len(features) == 7 + 4 + 3 + 8 + 3 + 4 + 16, sorted(features)
