"""Scoring many edges in one pass: how many heads to hold in FP32 meanwhile.

Methods that score all edges at once cannot switch precision for every edge. They can hold a group of heads in FP32,
score the edges into these heads, and go on with the next group: fewer passes with larger groups, for more memory.
Effects are exact single-edge removals from the full model, measured in the arithmetic of each group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pahq.engine import Engine
from pahq.errors import PahqError
from pahq.evaluation.precision.agreement import agreement
from pahq.evaluation.precision.edges import Edge, edge_effects
from pahq.graph import Graph
from pahq.model.transformer import Transformer
from pahq.precision.policy import FP32, LINEAR, Policy
from pahq.precision.size import head_bytes, weight_bytes
from pahq.task.prompts import Prompts

HEADS = 8
"""Heads that are drawn, where nobody says how many."""

Head = tuple[int, int]
"""(layer, head)"""


@dataclass(frozen=True)
class Groups:
    """rows: ``quantised``, ``group`` (heads held in FP32 at a time), ``passes``, ``bytes_high`` (FP32 weights held),
    ``bytes`` (with the low-precision copies of all weights), ``seconds_base`` (copies, base and reference runs),
    ``seconds_scoring``, ``seconds`` (both), the figures of ``agreement``. heads: whose edges were scored."""

    rows: list[dict[str, Any]]
    heads: list[str]
    edges: int
    fp32_bytes: int
    fp32_seconds: float


def check_sizes(sizes: Sequence[int]) -> None:
    """Raises PahqError where a size is none."""
    if not sizes or min(sizes) < 0:
        raise PahqError(f"sizes: {min(sizes, default='none')} is no size of a group; give numbers from 0 on")


def group_sizes(sampled: int, total: int) -> list[int]:
    """No head, 1, 2, 4, … up to all heads sampled, and all heads of the model."""
    powers = [2**i for i in range(sampled.bit_length()) if 2**i < sampled]
    return sorted({0, *powers, sampled, total})


def ways(policy: Policy) -> list[Policy]:
    """The policy's formats for values and for differences (products alone there), nothing else under test."""
    linear = {kind: name for kind, name in policy.formats.items() if kind in LINEAR}
    both = [
        replace(policy, quantised="values", under_test="none"),
        replace(policy, formats=linear, quantised="differences", under_test="none"),
    ]
    return [one for one in both if not one.is_fp32]


def draw(graph: Graph, heads: int, tests: int, seed: int) -> dict[Head, list[Edge]]:
    """About ``tests`` edges into the queries, keys and values of ``heads`` heads, drawn at random.

    Raises PahqError where a model has fewer heads than asked for.
    """
    cfg, rng = graph.config, np.random.default_rng(seed)
    every = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    if not 1 <= heads <= len(every):
        raise PahqError(f"heads: {heads} of {cfg.name}'s {len(every)} heads cannot be drawn; give 1 to {len(every)}")
    if tests < heads:
        raise PahqError(f"tests: {tests} edges are too few for {heads} heads; give at least {heads}")
    chosen = sorted(every[i] for i in rng.choice(len(every), heads, replace=False))
    edges: dict[Head, list[Edge]] = {}
    taken: set[Edge] = set()  # heads of a group share keys and values
    for number, (layer, head) in enumerate(chosen):
        share = tests * (number + 1) // heads - tests * number // heads
        rows = [
            row
            for row, receiver in enumerate(graph.receivers)
            if receiver.is_attention and receiver.layer == layer and head in graph.heads_of(receiver)
        ]
        mine = [(row, column) for row in rows for column in np.flatnonzero(graph.edges[row, : graph.direct]).tolist()]
        mine = [edge for edge in mine if edge not in taken]
        picked = rng.choice(len(mine), min(share, len(mine)), replace=False) if mine else []
        edges[layer, head] = [mine[i] for i in sorted(int(i) for i in picked)]
        taken |= set(edges[layer, head])
    return edges


def measure_groups(
    model: Transformer,
    prompts: Prompts,
    metric: str,
    ablation: str,
    policy: Policy,
    threshold: float,
    heads: int | None = None,
    tests: int = 64,
    seed: int = 0,
    sizes: Sequence[int] | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Groups:
    """Group size against memory, time and agreement with FP32's effects, for values and for differences.

    threshold: of decisions in the figures of ``agreement``. heads: how many are drawn, None for eight or all there are;
    tests: edges into them. sizes: None for ``group_sizes``; all heads of the model
    where a size is at least their number. on_step: told (what, passes done, passes in all).
    Raises PahqError for FP32, which has no low precision, and for odd sizes.
    """
    if policy.is_fp32:
        raise PahqError(f"policy '{policy.name}': everything is FP32, so there are no groups; take pahq or pahq-values")
    policy.require(model.device, model.dtype)
    graph = Graph(model.config)
    total = model.config.n_layers * model.config.n_heads
    heads = min(HEADS, total) if heads is None else heads
    edges = draw(graph, heads, tests, seed)
    sizes = group_sizes(heads, total) if sizes is None else sorted({min(size, total) for size in sizes})
    check_sizes(sizes)
    flat = [edge for some in edges.values() for edge in some]
    of = sum(max(1, len(_split(list(edges), size, total))) for size in sizes) * len(ways(policy)) + 1
    done = 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(what, done, of)

    def score(one: Policy, some: Sequence[Edge]) -> tuple[np.ndarray, float, float]:
        begin = time.perf_counter()
        engine = Engine(model, prompts, graph, metric, ablation, screen=False, policy=one)
        engine.store.make_all()
        middle = _now(model)
        effects = edge_effects(engine, some)
        return effects, middle - begin, _now(model) - middle

    exact, base, scoring = score(FP32, flat)
    step("FP32")
    rows: list[dict[str, Any]] = []
    for way in ways(policy):
        low_bytes = sum(weight_bytes(model, way).values())
        for size in sizes:
            parts = _split(list(edges), size, total)
            found: list[np.ndarray] = []
            seconds, high = np.zeros(2), 0
            for group in parts:
                held = _every_head(model) if size == total else frozenset(group if size else ())
                some = [edge for head in group for edge in edges[head]]
                effects, *spent = score(replace(way, heads=held), some)
                found.append(effects)
                seconds += spent
                high = max(high, head_bytes(model, held))
                step(f"{way.quantised}, groups of {size}")
            rows.append(
                {"quantised": way.quantised, "group": size, "passes": len(parts), "bytes_high": high}
                | {"bytes": low_bytes + high, "seconds_base": float(seconds[0]), "seconds_scoring": float(seconds[1])}
                | {"seconds": float(seconds.sum())}
                | agreement(np.concatenate(found), exact, threshold)
            )
    fp32_bytes = sum(weight_bytes(model, FP32).values())
    return Groups(rows, [f"a{layer}.{head}" for layer, head in edges], len(flat), fp32_bytes, base + scoring)


def _split(heads: list[Head], size: int, total: int) -> list[list[Head]]:
    """The sampled heads in groups; all at once where none or every head of the model is held."""
    step = len(heads) if size in (0, total) else size
    return [heads[i : i + step] for i in range(0, len(heads), step)]


def _every_head(model: Transformer) -> frozenset[Head]:
    return frozenset((layer, head) for layer in range(model.config.n_layers) for head in range(model.config.n_heads))


def _now(model: Transformer) -> float:
    """The time once the device has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
