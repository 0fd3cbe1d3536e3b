"""ACDC: sequential, greedy pruning of edges (Conmy et al. 2023), with the engine's shortcuts and none of its own.

Decisions are those of the plain algorithm: an edge goes if removing it raises the metric by less
than the threshold, given all earlier decisions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from pahq.engine.engine import MEMORY_LIMIT, Engine
from pahq.engine.marks import Marks
from pahq.engine.reference import ABLATIONS
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.method.check import Check
from pahq.method.measure import Measurer
from pahq.method.speculate import MAX_STATES, Speculator
from pahq.method.sweep import Sweep, restricted, visits
from pahq.model.transformer import Transformer
from pahq.precision.policy import FP32, Policy
from pahq.precision.schedule import Scheduler
from pahq.task.metrics import metric_class
from pahq.task.prompts import Prompts

HeadOrder = Literal["descending", "ascending"]
SenderOrder = Literal["latest", "earliest"]
BASE_TOLERANCE = 1.5e-2
"""Slack that the current metric may carry along, as a share of the threshold."""
CHECKPOINT_TESTS = 256
"""A checkpoint is due at the end of a visit once so many tests were made since the last one."""


@dataclass(frozen=True)
class AcdcOptions:
    """Everything that can change ACDC's result.

    threshold: in units of the metric (nats for kl_div); > 0 is usual, any finite number is allowed.
    metric: see ``task.metrics``; ablation: ``resample``, ``zero`` or ``mean``.
    absolute: compare |effect| with the threshold instead of the signed effect.
    head_order, sender_order: order in which a receiver's senders are tested.
    split_qkv, direct_edges, split_pos: see ``graph.Graph``.
    policy: precision, see ``precision.policy``. exact: have every decision that low precision cannot bear taken in
    FP32, None: under policies that quantise differences (under others it is refused).
    """

    threshold: float
    metric: str = "kl_div"
    ablation: str = "resample"
    absolute: bool = False
    head_order: HeadOrder = "descending"
    sender_order: SenderOrder = "latest"
    split_qkv: bool = True
    direct_edges: bool = True
    split_pos: bool = False
    policy: Policy = FP32
    exact: bool | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise PahqError(f"threshold {self.threshold}: give a finite number, for example 0.01")
        metric_class(self.metric)
        for name, value, known in (
            ("ablation", self.ablation, ABLATIONS),
            ("head_order", self.head_order, get_args(HeadOrder)),
            ("sender_order", self.sender_order, get_args(SenderOrder)),
        ):
            if value not in known:
                raise PahqError(f"{name} '{value}' is unknown; choose one of {', '.join(known)}")
        if self.exact and not self.policy.differences:
            why = "is FP32 throughout" if self.policy.is_fp32 else "rounds values, its base state included"
            raise PahqError(f"exact: policy '{self.policy.name}' {why}; leave --exact out, or take pahq, bf16 or int8")

    @property
    def escalates(self) -> bool:
        return self.policy.differences if self.exact is None else self.exact


@dataclass(frozen=True)
class Decision:
    """One tested edge. before, after: the metric with and without it; row, column: its place in the mask.

    checkpoint: the sweep can be taken up again right after this decision.
    refined: measured in FP32 after low precision. error, moved: what ``method.margin`` learned at this decision.
    """

    order: int
    row: int
    column: int
    before: float
    after: float
    kept: bool
    checkpoint: bool = False
    refined: bool = False
    error: float | None = None
    moved: float | None = None

    @property
    def effect(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class Progress:
    """Where a sweep stands. decisions: those taken since the last report; metric: of the current state."""

    decisions: list[Decision]
    tested: int
    kept: int
    metric: float
    edges_left: int
    states: int
    wasted: int


@dataclass(frozen=True)
class AcdcResult:
    """mask bool, effects float64 (NaN if untested), order int64 (-1 if untested), each [n_receivers, n_senders + 1]."""

    graph: Graph
    mask: np.ndarray
    effects: np.ndarray
    order: np.ndarray
    decisions: list[Decision]
    metric: float
    stats: dict[str, Any] = field(default_factory=dict)


class Acdc:
    """One sweep over one model, prompts and options."""

    def __init__(
        self,
        model: Transformer,
        prompts: Prompts,
        options: AcdcOptions,
        memory_limit: int = MEMORY_LIMIT,
        max_states: int = MAX_STATES,
        screen: bool | None = None,
        check: bool = False,
        scheduler: Scheduler | None = None,
        start: np.ndarray | None = None,
        strength: np.ndarray | None = None,
    ) -> None:
        """memory_limit (bytes) and max_states bound a batch; decisions stay the same. screen: see ``engine.Engine``.

        check: evaluate every state in FP32 as well, and count disagreements. scheduler: see ``engine.Engine``.
        start: bool [n_receivers, n_senders + 1], the edges that are swept; all others are gone beforehand (None: none).
        strength: float of the same shape; a receiver's senders are tested from the least strength up.
        """
        self.options = options
        self.graph = Graph(model.config, options.split_qkv, options.direct_edges, options.split_pos)
        self.engine = Engine(
            model,
            prompts,
            self.graph,
            options.metric,
            options.ablation,
            memory_limit,
            screen,
            BASE_TOLERANCE * abs(options.threshold),
            options.policy,
            scheduler,
            start,
        )
        order = visits(self.graph, options.head_order == "ascending", options.sender_order == "earliest")
        if start is not None or strength is not None:
            order = restricted(order, self.graph.edges if start is None else start, strength)
        self.sweep = Sweep(order, Marks.full(self.graph, start))
        self.speculator = Speculator(self.graph, options.threshold, options.absolute, max_states)
        self.measurer = Measurer(self.engine, options.threshold, options.absolute, options.escalates)
        self.check = Check(self.engine, model, prompts, options, start) if check else None
        self.decisions: list[Decision] = []
        self._since_checkpoint = 0
        self._kept = self._states = self._wasted = self._batches = 0

    def run(self, replay: Sequence[Decision] = (), on_batch: Callable[[Progress], None] | None = None) -> AcdcResult:
        """The whole sweep.

        replay: decisions of an interrupted run; it is taken up after the last one marked ``checkpoint``.
        on_batch: called with what each batch of states decided, before the next one starts.
        Raises PahqError if a replayed decision does not belong to this sweep, or a metric is not finite.
        """
        began = time.perf_counter()
        self._replay(replay)
        while self.sweep.peek() is not None:
            decided = self._batch()
            if on_batch is not None:
                on_batch(self._progress(decided))
        self.engine.rebase(self.sweep.marks)
        return self._result(time.perf_counter() - began)

    def _replay(self, decisions: Sequence[Decision]) -> None:
        usable = max((i + 1 for i, decision in enumerate(decisions) if decision.checkpoint), default=0)
        for decision in decisions[:usable]:
            if self.sweep.peek() != (decision.row, decision.column):
                raise PahqError(
                    f"journal: decision {decision.order} is not what this sweep tests next; "
                    "the journal belongs to another run or is damaged"
                )
            self.sweep.decide(decision.kept)
            self.speculator.decided((decision.row, decision.column), decision.effect)
            self._learn(decision)
            self._kept += decision.kept
        self.decisions = list(decisions[:usable])
        if usable:
            self.sweep.peek()
            self._rebase()

    def _rebase(self) -> None:
        self.engine.rebase(self.sweep.marks)
        if self.check is not None:
            self.check.rebase(self.sweep.marks)

    def _batch(self) -> list[Decision]:
        """Evaluates one batch of states and takes every decision that it supports."""
        stop_at = CHECKPOINT_TESTS - self._since_checkpoint
        edge = self.sweep.peek()
        lacks = 0 if edge is None else self.measurer.lacks(self.graph.receivers[edge[0]].kind)
        # Every state of a kind that lacks some is measured in FP32 as well: no more of them than it takes.
        batch, guesses = self.speculator.batch(self.sweep, stop_at, lacks or None)
        before = self.engine.flops.recurring
        metrics, slack = self.engine.evaluate(batch)
        cost = (self.engine.flops.recurring - before) / len(metrics)
        self.speculator.overhead = self.engine.batch_overhead / max(cost, 1.0)
        kinds = [self.graph.receivers[row].kind for row, _ in batch.candidates]
        measured = self.measurer.measure(metrics, slack, guesses, kinds, len(self.decisions))
        self._states += len(metrics)
        self._batches += 1
        decided: list[Decision] = []
        at, right = -1, True  # state of the current prefix; whether all guesses held
        visit = self.sweep.at_visit
        for state, found in enumerate(measured):
            edge, guess = batch.candidates[state], guesses[state]
            effect = found.after - found.before
            if not right:
                self.speculator.measured(edge, effect)
                self._wasted += 1
                continue
            keep = self.speculator.keeps(effect)
            assert self.sweep.peek() == edge
            visit = self.sweep.at_visit  # after peek, which passes over dead receivers
            self.sweep.decide(keep)
            self.speculator.decided(edge, effect, guess)
            order = len(self.decisions) + len(decided)
            decided.append(
                Decision(
                    order,
                    *edge,
                    found.before,
                    found.after,
                    keep,
                    refined=found.refined,
                    error=found.error,
                    moved=found.moved,
                )
            )
            right = keep == guess
            if not keep:
                at = state
        if self.check is not None:
            self.check.batch(batch, decided, at)
        if at >= 0:
            self.engine.commit(at)
        self._since_checkpoint += len(decided)
        if self._since_checkpoint >= CHECKPOINT_TESTS and self.sweep.at_visit != visit:
            self._checkpoint(decided)
        self._kept += sum(decision.kept for decision in decided)
        for decision in decided:
            self._learn(decision)
        self.decisions += decided
        return decided

    def _learn(self, decision: Decision) -> None:
        """Takes in what a decision tells about low precision's errors; the journal has it for a resumed run."""
        if decision.error is not None and decision.moved is not None:
            kind = self.graph.receivers[decision.row].kind
            self.measurer.margin.observe(kind, decision.error, decision.moved, decision.before)

    def _checkpoint(self, decided: list[Decision]) -> None:
        """From here on nothing depends on how the state was reached, so that a resumed run goes the same way."""
        decided[-1] = replace(decided[-1], checkpoint=True)
        self._since_checkpoint = 0
        self.speculator.reset()
        self.sweep.peek()
        self._rebase()

    def _progress(self, decided: list[Decision]) -> Progress:
        return Progress(
            decisions=decided,
            tested=len(self.decisions),
            kept=self._kept,
            metric=self.engine.base_metric,
            edges_left=self.sweep.edges_left(),
            states=self._states,
            wasted=self._wasted,
        )

    def _precision(self) -> dict[str, Any]:
        """How low precision fared: what was decided in FP32, the error model, and what a check found."""
        refined = sum(decision.refined for decision in self.decisions)
        margin = self.measurer.margin
        found: dict[str, Any] = {
            "refined": refined,
            "refined_share": refined / max(1, len(self.decisions)),
            "exact_states": self.engine.exact_states,
            "largest_error": margin.error,
            "error_per_movement": margin.largest,
            "measured_both_ways": margin.seen,
        }
        return found if self.check is None else found | {"check": self.check.figures()}

    def _result(self, seconds: float) -> AcdcResult:
        effects = np.full(self.graph.shape, np.nan)
        order = np.full(self.graph.shape, -1, dtype=np.int64)
        for decision in self.decisions:
            effects[decision.row, decision.column] = decision.effect
            order[decision.row, decision.column] = decision.order
        stats = {
            "tests": len(self.decisions),
            "states": self._states,
            "wasted": self._wasted,
            "batches": self._batches,
            "escalated": self.engine.escalated,
            "precision": self._precision(),
            "seconds": seconds,
            "flops": dict(self.engine.flops.by_component),
        }
        mask = self.sweep.marks.mask.copy()
        return AcdcResult(self.graph, mask, effects, order, self.decisions, self.engine.base_metric, stats)
