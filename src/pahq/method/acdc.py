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
from pahq.method.speculate import MAX_STATES, Speculator
from pahq.method.sweep import Sweep, visits
from pahq.model.transformer import Transformer
from pahq.precision.policy import FP32, Policy
from pahq.task.metrics import metric_class
from pahq.task.prompts import Prompts

HeadOrder = Literal["descending", "ascending"]
SenderOrder = Literal["latest", "earliest"]
BASE_TOLERANCE = 4e-3
"""Slack that the current metric may carry along, as a share of the threshold."""
ROUGH = 0.5
"""Slack that a recorded effect may have, as a share of itself or of the threshold, whichever is larger.

Slack is many times the error to be expected, which so stays within a few hundredths.
"""
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
    exact: bool = False

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


@dataclass(frozen=True)
class Decision:
    """One tested edge. before, after: the metric with and without it; row, column: its place in the mask.

    checkpoint: the sweep can be taken up again right after this decision.
    """

    order: int
    row: int
    column: int
    before: float
    after: float
    kept: bool
    checkpoint: bool = False

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
    ) -> None:
        """screen: see ``engine.Engine``. memory_limit (bytes) and max_states bound a batch. Decisions stay the same."""
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
        )
        order = visits(self.graph, options.head_order == "ascending", options.sender_order == "earliest")
        self.sweep = Sweep(order, Marks.full(self.graph))
        self.speculator = Speculator(self.graph, options.threshold, options.absolute, max_states)
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
            self._kept += decision.kept
        self.decisions = list(decisions[:usable])
        if usable:
            self.sweep.peek()
            self.engine.rebase(self.sweep.marks)

    def _batch(self) -> list[Decision]:
        """Evaluates one batch of states and takes every decision that it supports."""
        stop_at = CHECKPOINT_TESTS - self._since_checkpoint
        batch, guesses = self.speculator.batch(self.sweep, stop_at)
        before = self.engine.flops.recurring
        metrics, slack = self.engine.evaluate(batch)
        cost = (self.engine.flops.recurring - before) / len(metrics)
        self.speculator.overhead = self.engine.batch_overhead / max(cost, 1.0)
        self._sharpen(metrics, slack, guesses)
        base = self.engine.base_metric
        self._states += len(metrics)
        self._batches += 1
        decided: list[Decision] = []
        current, at, right = base, -1, True  # metric and state of the current prefix; whether all guesses held
        visit = self.sweep.at_visit
        guessed_metric = base
        for state, after in enumerate(metrics.tolist()):
            edge, guess = batch.candidates[state], guesses[state]
            if not right:
                self.speculator.measured(edge, after - guessed_metric)
                self._wasted += 1
            else:
                keep = self.speculator.keeps(after - current)
                assert self.sweep.peek() == edge
                visit = self.sweep.at_visit  # after peek, which passes over dead receivers
                self.sweep.decide(keep)
                self.speculator.decided(edge, after - current, guess)
                decided.append(Decision(len(self.decisions) + len(decided), *edge, current, after, keep))
                right = keep == guess
                if not keep:
                    current, at = after, state
            if not guess:
                guessed_metric = after
        if at >= 0:
            self.engine.commit(at)
        self._since_checkpoint += len(decided)
        if self._since_checkpoint >= CHECKPOINT_TESTS and self.sweep.at_visit != visit:
            self._checkpoint(decided)
        self._kept += sum(decision.kept for decision in decided)
        self.decisions += decided
        return decided

    def _sharpen(self, metrics: np.ndarray, slack: np.ndarray, guesses: list[bool]) -> None:
        """Has the states evaluated in full on which a decision within its slack of the threshold would rest.

        Also those of edges that stay, and those whose slack would make the recorded effect rough.
        """
        doubtful: set[int] = set()
        before = -1
        for state, guess in enumerate(guesses[: len(metrics)]):
            base, base_slack = (
                (metrics[before], slack[before]) if before >= 0 else (self.engine.base_metric, self.engine.base_slack)
            )
            effect = metrics[state] - base
            size = abs(effect) if self.options.absolute else effect
            doubt = slack[state] + base_slack
            rough = doubt > ROUGH * max(abs(effect), abs(self.options.threshold))
            if rough or size >= self.options.threshold - doubt:
                doubtful |= {state, before}
            if not guess:
                before = state
        if doubtful:
            self.engine.sharpen(sorted(doubtful))

    def _checkpoint(self, decided: list[Decision]) -> None:
        """From here on nothing depends on how the state was reached, so that a resumed run goes the same way."""
        decided[-1] = replace(decided[-1], checkpoint=True)
        self._since_checkpoint = 0
        self.speculator.reset()
        self.sweep.peek()
        self.engine.rebase(self.sweep.marks)

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
            "seconds": seconds,
            "flops": dict(self.engine.flops.by_component),
        }
        mask = self.sweep.marks.mask.copy()
        return AcdcResult(self.graph, mask, effects, order, self.decisions, self.engine.base_metric, stats)
