"""The recorded runs of the original ACDC code: same edges in the same order, same decisions, same effects.

``PAHQ_GOLDEN`` names the folder (default ``../shared/golden``); every case that lies there is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pytest
import torch
from _pytest.mark.structures import ParameterSet

import golden
import oracle
from pahq.method.acdc import Acdc, AcdcOptions

TOLERANCE = 1e-4
SLOW_ORACLE = 300  # more tested edges than this take the oracle too long for the usual run

names = golden.case_names()
pytestmark = pytest.mark.skipif(
    not names, reason=f"no golden cases in {golden.folder()}; set PAHQ_GOLDEN to the folder that holds them"
)


class Decided(Protocol):
    @property
    def row(self) -> int: ...
    @property
    def column(self) -> int: ...
    @property
    def effect(self) -> float: ...
    @property
    def kept(self) -> bool: ...


@dataclass
class Comparison:
    """How far a run agrees with the record. close: decisions whose recorded effect is nearer to the threshold
    than the tolerance, and which another machine might take otherwise; they are counted all the same."""

    agree: int = 0
    expected: int = 0
    close: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def add(self, case: golden.Case, decisions: Sequence[Decided], mask: np.ndarray, final: float) -> None:
        """Compares order, decisions and effects edge by edge, then the circuit and its metric."""
        self.expected += len(case.evals)
        if len(decisions) != len(case.evals):
            self.complaints.append(f"{case.name}: {len(decisions)} edges tested, recorded are {len(case.evals)}")
        for order, (ours, theirs) in enumerate(zip(decisions, case.evals, strict=False)):
            effect = abs(theirs.effect) if case.absolute else theirs.effect
            name = f"{case.name}, test {order}: {case.graph.edge_name(theirs.row, theirs.column)} {theirs.effect:.6g}"
            if abs(effect - case.threshold) < TOLERANCE:
                self.close.append(f"{name}, threshold {case.threshold:g}")
            same = (ours.row, ours.column, ours.kept) == (theirs.row, theirs.column, theirs.kept)
            if same and abs(ours.effect - theirs.effect) <= TOLERANCE:
                self.agree += 1
                continue
            self.complaints.append(
                f"{name} {'kept' if theirs.kept else 'removed'} is recorded; "
                f"ours is {case.graph.edge_name(ours.row, ours.column)} {ours.effect:.6g} "
                f"{'kept' if ours.kept else 'removed'}"
            )
        if {(int(r), int(c)) for r, c in zip(*np.nonzero(mask), strict=True)} != case.kept:
            self.complaints.append(f"{case.name}: another circuit")
        if not abs(final - case.final_metric) <= TOLERANCE:
            self.complaints.append(f"{case.name}: final metric {final}, recorded is {case.final_metric}")

    def check(self) -> None:
        assert not self.complaints, "\n".join(self.complaints[:20])
        assert self.agree == self.expected


def oracle_cases() -> Iterator[ParameterSet]:
    for name in names:
        lines = (golden.folder() / name / "evals.jsonl").read_text().count("\n")
        yield pytest.param(name, marks=[pytest.mark.heavy] if lines > SLOW_ORACLE else [])


@pytest.mark.parametrize("name", names)
def test_models_reproduce_the_recorded_logits(name: str) -> None:
    case = golden.load(name)
    atol = 1e-10 if case.model.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(case.model.forward(case.prompts.clean), case.clean_logits, rtol=0, atol=atol)


@pytest.mark.parametrize("name", list(oracle_cases()))
def test_oracle(name: str) -> None:
    case = golden.load(name)
    sweep = oracle.acdc(
        case.model,
        case.prompts,
        case.graph,
        case.threshold,
        case.metric,
        case.ablation,
        case.absolute,
        case.head_order,
        case.sender_order,
    )
    comparison = Comparison()
    comparison.add(case, sweep.decisions, sweep.mask, sweep.metric)
    comparison.check()


def test_engine(capsys: pytest.CaptureFixture[str]) -> None:
    comparison = Comparison()
    for name in names:
        case = golden.load(name)
        options = AcdcOptions(
            threshold=case.threshold,
            metric=case.metric,
            ablation=case.ablation,
            absolute=case.absolute,
            head_order=case.head_order,
            sender_order=case.sender_order,
            split_pos=case.graph.split_pos,
        )
        result = Acdc(case.model, case.prompts, options).run()
        comparison.add(case, result.decisions, result.mask, result.metric)
    with capsys.disabled():
        print(f"\ngolden: {comparison.agree} of {comparison.expected} decisions agree in {len(names)} cases")
        for line in comparison.close:
            print(f"golden: closer to the threshold than {TOLERANCE:g}: {line}")
    comparison.check()
