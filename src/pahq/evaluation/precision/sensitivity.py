"""Which kind of component can bear which format: effects under policies that lower one kind alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pahq.engine import Engine
from pahq.errors import PahqError
from pahq.evaluation.precision.agreement import agreement
from pahq.evaluation.precision.replay import Tested, Window, replay, sweep, windows
from pahq.graph import Graph
from pahq.method.acdc import AcdcOptions, Progress
from pahq.model.transformer import Transformer
from pahq.precision.formats import get_format
from pahq.precision.policy import FP32, KINDS, LINEAR, Policy, Quantised
from pahq.precision.size import table_bytes, weight_bytes
from pahq.task.prompts import Prompts

FORMATS = ("bf16", "e4m3", "e5m2", "int8")


@dataclass(frozen=True)
class Choice:
    """The table that a budget allows. bytes: of all weights; predicted: root mean square error of an effect if those
    of the kinds are independent; measured: as in the rows of ``Sensitivity``."""

    quantised: str
    formats: dict[str, str]
    bytes: int
    budget: int
    predicted: float
    measured: dict[str, Any]


@dataclass(frozen=True)
class Sensitivity:
    """rows: ``kind``, ``format``, ``quantised``, the figures of ``agreement``, ``bytes`` of all weights, ``seconds``
    of the evaluation and ``time_ratio`` to FP32's. tests: how many effects were compared, of how many in the sweep."""

    rows: list[dict[str, Any]]
    choices: list[Choice]
    tests: int
    sweep_tests: int
    fp32_bytes: int
    fp32_seconds: float


class Watcher:
    """Told how a measurement goes on; this one ignores it."""

    def sweep(self, progress: Progress) -> None:
        """A batch of the sweep was decided."""

    def step(self, what: str, done: int, of: int) -> None:
        """Something was finished, the ``done``-th of ``of``."""


def measure_sensitivity(
    model: Transformer,
    prompts: Prompts,
    options: AcdcOptions,
    kinds: Sequence[str] | None = None,
    formats: Sequence[str] = FORMATS,
    quantised: str = "differences",
    tests: int = 400,
    budget: str | None = None,
    watcher: Watcher | None = None,
    swept: Sequence[Tested] | None = None,
) -> Sensitivity:
    """Component kind x format: agreement with FP32, bytes, time; and the table that a budget allows.

    options: of the FP32 sweep whose states are sampled. kinds: None for all that can be lowered. quantised:
    ``differences``, ``values`` or ``both``; what is no matrix product is always rounded as values. tests: effects to
    compare. budget: bytes of all weights, or a share of FP32's such as ``0.4x``; None for half of FP32's, or the
    least that these formats take. swept: the tests of a sweep made before with the same options; None makes it now,
    which takes most of the time.
    Raises PahqError for unknown kinds and formats, and a budget that no table meets.
    """
    watcher = Watcher() if watcher is None else watcher
    policies = single_policies(kinds, formats, quantised)
    if tests < 1:
        raise PahqError(f"tests: {tests} are too few; give at least 1")
    for policy in policies:
        policy.require(model.device, model.dtype)
    fp32_bytes = sum(weight_bytes(model, FP32).values())
    limits = {
        mode: _limit(model, [policy for policy in policies if policy.quantised == mode], mode, budget, fp32_bytes)
        for mode in _modes(quantised)
    }
    options = replace(options, policy=FP32, exact=None)
    decisions = sweep(model, prompts, options, watcher.sweep) if swept is None else swept
    graph = Graph(model.config, options.split_qkv, options.direct_edges, options.split_pos)
    sample = windows(graph, options, decisions, tests)
    steps = 1 + len(policies) + len(_modes(quantised))
    measure = _Measure(model, prompts, graph, options, sample)
    watcher.step("FP32", 1, steps)
    rows: list[dict[str, Any]] = []
    for policy in policies:
        (kind, name), *_ = policy.formats.items()
        rows.append({"kind": kind, "format": name, "quantised": policy.quantised} | measure(policy))
        watcher.step(policy.name, 1 + len(rows), steps)
    choices = []
    for mode in _modes(quantised):
        table, predicted = recommend(model, [row for row in rows if row["quantised"] == mode], mode, limits[mode])
        policy = Policy(f"{mode}:recommended", table, "values" if mode == "values" else "differences")
        choices.append(Choice(mode, table, table_bytes(model, table, mode), limits[mode], predicted, measure(policy)))
        watcher.step(policy.name, 1 + len(rows) + len(choices), steps)
    return Sensitivity(rows, choices, len(measure.exact), len(decisions), fp32_bytes, measure.seconds)


class _Measure:
    """Compares policies with FP32 on one sample of states."""

    def __init__(
        self, model: Transformer, prompts: Prompts, graph: Graph, options: AcdcOptions, sample: Sequence[Window]
    ) -> None:
        self.model, self.prompts, self.graph, self.options, self.sample = model, prompts, graph, options, sample
        self.exact, self.seconds = self._effects(FP32)

    def _effects(self, policy: Policy) -> tuple[np.ndarray, float]:
        options = self.options
        engine = Engine(
            self.model, self.prompts, self.graph, options.metric, options.ablation, screen=False, policy=policy
        )
        engine.store.make_all()
        begin = time.perf_counter()
        found = replay(engine, self.sample)
        found = np.abs(found) if options.absolute else found
        return found, time.perf_counter() - begin

    def __call__(self, policy: Policy) -> dict[str, Any]:
        low, seconds = (self.exact, self.seconds) if policy.is_fp32 else self._effects(policy)
        size = sum(weight_bytes(self.model, policy).values())
        figures: dict[str, Any] = {**agreement(low, self.exact, self.options.threshold)}
        return figures | {"bytes": size, "seconds": seconds, "time_ratio": seconds / self.seconds}


def single_policies(kinds: Sequence[str] | None, formats: Sequence[str], quantised: str) -> list[Policy]:
    """A policy for every kind and format (and way of quantising) that can be had; raises PahqError for odd names."""
    if quantised not in ("differences", "values", "both"):
        raise PahqError(f"quantised '{quantised}' is unknown; choose differences, values or both")
    for name in formats:
        get_format(name)
    for kind in kinds or ():
        if kind not in KINDS:
            raise PahqError(f"component '{kind}' is unknown; known: {', '.join(KINDS)}")
    if not formats or (kinds is not None and not kinds):
        raise PahqError("formats and kinds: name at least one of each")
    modes: tuple[Quantised, ...] = ("differences", "values")
    return [
        Policy(f"{mode}:{kind}={name}", {kind: name}, mode)
        for mode in modes
        for kind in dict.fromkeys(KINDS if kinds is None else kinds)
        for name in dict.fromkeys(formats)
        # what is no product has but one way: rounding its values
        if (mode == quantised or quantised == "both" or kind not in LINEAR) and (mode == "values" or kind in LINEAR)
    ]


def _modes(quantised: str) -> tuple[str, ...]:
    return ("differences", "values") if quantised == "both" else (quantised,)


def budget_bytes(text: str, whole: int) -> int:
    """``0.4x`` -> that share of ``whole``; ``120e6`` -> so many bytes. Raises PahqError for anything else."""
    try:
        number = float(text.removesuffix("x"))
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise PahqError(f"budget '{text}' is no size; give bytes such as 120e6, or a share of FP32's such as 0.4x")
    return int(number * whole) if text.endswith("x") else int(number)


def _limit(model: Transformer, policies: Sequence[Policy], mode: str, budget: str | None, fp32: int) -> int:
    """Bytes that the recommended table may take; fp32: those of FP32.

    Raises PahqError, before anything is computed, if even the smallest formats take more than the budget.
    """
    smallest: dict[str, str] = {}
    for policy in policies:
        (kind, name), *_ = policy.formats.items()
        if kind not in smallest or get_format(name).bits < get_format(smallest[kind]).bits:
            smallest[kind] = name
    size = table_bytes(model, smallest, mode)
    if budget is None:
        return max(fp32 // 2, size)
    limit = budget_bytes(budget, fp32)
    if size > limit:
        raise PahqError(
            f"budget: {limit:,} bytes are fewer than the {size:,} ({size / fp32:.3f}x of FP32) that the smallest of "
            "these formats take; raise --budget, or name more kinds or smaller formats"
        )
    return limit


def recommend(
    model: Transformer, rows: Sequence[dict[str, Any]], quantised: str, limit: int
) -> tuple[dict[str, str], float]:
    """The formats of the measured kinds that fit into ``limit`` bytes, and the root mean square error to be expected.

    Greedy: from FP32, always the change of one kind's format that adds least squared error for each byte saved, until
    the weights fit; then whatever change takes most error away and still fits. Errors of different kinds are taken to
    be independent, so that their squares add up.
    """
    errors = {(row["kind"], row["format"]): float(row["error_rms"]) ** 2 for row in rows}
    errors |= {(kind, "fp32"): 0.0 for kind, _ in errors}
    table = {kind: "fp32" for kind, _ in errors}

    def size(formats: dict[str, str]) -> int:
        return table_bytes(model, formats, quantised)

    def added(kind: str, name: str) -> float:
        return errors[kind, name] - errors[kind, table[kind]]

    while (now := size(table)) > limit:
        moves = [(now - size(table | {kind: name}), kind, name) for kind, name in errors]
        # some move is left: it was made sure that the smallest formats fit
        _, _, kind, name = min(
            (added(kind, name) / saved, -saved, kind, name) for saved, kind, name in moves if saved > 0
        )
        table[kind] = name
    while True:
        better = [
            (added(kind, name), kind, name)
            for kind, name in errors
            if added(kind, name) < 0 and size(table | {kind: name}) <= limit
        ]
        if not better:
            break
        _, kind, name = min(better)
        table[kind] = name
    error = sum(errors[choice] for choice in table.items()) ** 0.5
    return {kind: name for kind, name in table.items() if name != "fp32"}, error
