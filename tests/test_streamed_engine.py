"""Sweeps whose weights are streamed, on worker threads, against the same sweeps with the weights in place."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given

from pahq.engine.gradients import Gradients
from pahq.method.acdc import Acdc, AcdcOptions, AcdcResult
from pahq.model.transformer import Transformer
from pahq.precision.differentiable import differentiable
from pahq.precision.policy import get_policy
from pahq.precision.schedule import Scheduler, make_scheduler
from pahq.precision.streamed import streamed
from pahq.precision.trace import Trace
from random_models import Case, cases, drawn

POLICIES = ("fp32", "bf16", "int8", "pahq", "pahq-values", "rtn")


def sweep(case: Case, policy: str, model: Transformer, scheduler: Scheduler | None) -> AcdcResult:
    options = AcdcOptions(
        threshold=0.01,
        metric=case.metric,
        ablation=case.ablation,
        absolute=case.absolute,
        policy=get_policy(policy),
        split_qkv=case.graph.split_qkv,
        direct_edges=case.graph.direct_edges,
        split_pos=case.graph.split_pos,
    )
    return Acdc(model, case.prompts, options, max_states=12, scheduler=scheduler).run()


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_same_sweep(policy: str, threads: bool) -> None:
    @drawn(6)
    @given(case=cases(torch.float32))
    def run(case: Case) -> None:
        expected = sweep(case, policy, case.model, None)
        with make_scheduler("cpu", threads=threads) as scheduler:
            model = streamed(case.model, "cpu", scheduler, copy=True)
            result = sweep(case, policy, model, scheduler)
        assert [dataclasses.astuple(d) for d in result.decisions] == [
            dataclasses.astuple(d) for d in expected.decisions
        ]
        assert np.array_equal(result.mask, expected.mask)

    run()


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "fp32"])
def test_same_gradients(policy: str) -> None:
    @drawn(6)
    @given(case=cases(torch.float32))
    def run(case: Case) -> None:
        found = []
        with make_scheduler("cpu") as scheduler:
            for model in (case.model, streamed(case.model, "cpu", scheduler, copy=True)):
                low = differentiable(model, get_policy(policy))
                gradients = Gradients(low, case.prompts, case.graph, case.metric, case.ablation, full=model)
                found.append(gradients.gradient(gradients.ones())[1])
        assert torch.equal(*found)

    run()


@pytest.mark.parametrize("streams", [(), ("load",), ("low", "high"), ("load", "low", "high")])
def test_streams_change_nothing(streams: tuple[str, ...]) -> None:
    @drawn(6)
    @given(case=cases(torch.float32))
    def run(case: Case) -> None:
        expected = sweep(case, "pahq", case.model, None)
        with make_scheduler("cpu", streams, threads=True) as scheduler:
            result = sweep(case, "pahq", case.model, scheduler)
        assert [d.after for d in result.decisions] == [d.after for d in expected.decisions]

    run()


def test_streams_are_used() -> None:
    """The FP32 head under test goes the way of the paper: loaded, multiplied on one stream while others go low."""
    names: set[str] = set()

    @drawn(10)
    @given(case=cases(torch.float32))
    def run(case: Case) -> None:
        trace = Trace()
        with make_scheduler("cpu", threads=True, trace=trace) as scheduler:
            sweep(case, "pahq", case.model, scheduler)
        names.update(span.stream for span in trace.spans())

    run()
    assert {"load", "low", "high"} <= names
