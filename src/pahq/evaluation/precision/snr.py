"""How an edge's signal fares on its way through later layers in low precision.

Signal: what removing the edge changes in the FP32 residual stream. Noise: the same change in low precision, less
the signal. Where values are rounded both runs are rounded, and the change is the difference of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pahq.engine.engine import Engine
from pahq.engine.setup import round_metric
from pahq.errors import PahqError
from pahq.evaluation.precision.edges import Edge, strong_edge
from pahq.evaluation.precision.passes import Removal, removal
from pahq.graph import Graph
from pahq.model.transformer import Transformer
from pahq.precision.policy import FP32, LINEAR, Policy
from pahq.task.metrics import Metric, get_metric
from pahq.task.prompts import Prompts, check_padding


@dataclass(frozen=True)
class Snr:
    """edge: its name; why: how it was chosen. rows: one a variant and point of the residual stream.

    A row has ``variant``, ``quantised``, ``under_test``, ``point`` (``a3``: read by layer 3's attention, ``m3``: by
    its MLP, ``final``), ``layer``, and root mean squares over all positions: ``signal``, ``noise``, ``snr_db``
    (inf where there is no noise); the same at the positions that the metric reads: ``…_read``.
    effects: variant -> the edge's effect on the metric; ``fp32`` is the exact one.
    """

    edge: str
    why: str
    rows: list[dict[str, Any]]
    effects: dict[str, float]


def variants(policy: Policy) -> list[Policy]:
    """The policy itself, then its formats for differences and values, with the heads under test in FP32 and without.

    Differences of what is no matrix product cannot be quantised: there such components stay FP32.
    """
    if policy.is_fp32:
        return [policy]
    linear = {kind: name for kind, name in policy.formats.items() if kind in LINEAR}
    found = [policy]
    for quantised, formats in (("differences", linear), ("values", dict(policy.formats))):
        for under_test in ("both", "none"):
            other = replace(policy, formats=formats, quantised=quantised, under_test=under_test)
            known = [(p.quantised, p.under_test) for p in found]
            if not other.is_fp32 and (quantised, under_test) not in known:
                found.append(other)
    return found


def name_of(policy: Policy) -> str:
    """``differences, both under test in FP32`` and the like."""
    if policy.is_fp32:
        return "fp32"
    under = {"none": "no head in FP32", "both": "sender and receiver in FP32"}
    return f"{policy.quantised}, {under.get(policy.under_test, policy.under_test + ' in FP32')}"


def heads_under_test(graph: Graph, edge: Edge, policy: Policy) -> frozenset[tuple[int, int]]:
    """The heads (layer, head) of an edge that a policy keeps in FP32."""
    receiver, heads = graph.receivers[edge[0]], set()
    if policy.receiver_under_test and receiver.is_attention:
        heads |= {(receiver.layer, head) for head in graph.heads_of(receiver)}
    if policy.sender_under_test and graph.senders[edge[1]].kind == "head":
        sender = graph.senders[edge[1]]
        heads.add((sender.layer, sender.index))
    return frozenset(heads)


def measure_snr(
    model: Transformer,
    prompts: Prompts,
    metric: str,
    ablation: str,
    policy: Policy,
    edge: str | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Snr:
    """Signal and noise of one edge, point by point, under every one of the policy's ``variants``.

    edge: such as ``a3.2->a7.1.q``; None takes a strong one (see ``edges.strong_edge``). on_step: told what comes next.
    Raises PahqError for an edge that does not exist or is a direct one, and what the policy cannot do.
    """
    tell = (lambda _: None) if on_step is None else on_step
    check_padding(prompts, model.config)
    policy.require(model.device, model.dtype)
    graph = Graph(model.config)
    if edge is None:
        tell("looking for a strong edge")
        at, why = strong_edge(Engine(model, prompts, graph, metric, ablation, screen=False))
    else:
        at, why = graph.edge(edge), "asked for"
        if at[1] == graph.direct:
            raise PahqError(f"edge '{edge}' is a direct one, which adds nothing to a residual stream; name a sender")
    tell("FP32")
    exact = removal(model, prompts, graph, at, ablation, FP32)
    clean = exact.full_read.logits()[0]  # the metric's reference is FP32's output, whatever the policy
    rows: list[dict[str, Any]] = []
    effects = {"fp32": _effect(get_metric(metric, prompts, clean), exact)}
    real = torch.ones_like(prompts.clean, dtype=torch.bool) if prompts.pad is None else ~prompts.pad
    for one in variants(policy):
        name = name_of(one)
        tell(name)
        low = exact
        if not one.is_fp32:
            high = replace(one, heads=one.heads | heads_under_test(graph, at, one))
            low = removal(model, prompts, graph, at, ablation, high)
        as_used = get_metric(metric, prompts, clean)
        if one.values and not one.format("metric").is_exact:
            as_used = round_metric(as_used, one.format("metric"))
        effects[name] = _effect(as_used, low)
        if not math.isfinite(effects[name]):
            raise PahqError(f"policy '{policy.name}': the metric became {effects[name]}; take scaled formats, or bf16")
        for point, stream in exact.full.items():
            signal = exact.cut[point] - stream
            if not bool(signal.any()):
                continue  # not downstream of the edge
            noise = (low.cut[point] - low.full[point]) - signal
            row: dict[str, Any] = {"variant": name, "quantised": one.quantised, "under_test": one.under_test}
            row |= {"point": point, "layer": model.config.n_layers if point == "final" else int(point[1:])}
            rows.append(row | _figures(signal, noise, real, "") | _figures(signal, noise, _read(prompts), "_read"))
    return Snr(graph.edge_name(*at), why, rows, effects)


def decibels(signal: float, noise: float) -> float:
    """20 log10 of the ratio; inf without noise, -inf without signal."""
    if noise == 0:
        return math.inf
    return 20 * math.log10(signal / noise) if signal else -math.inf


def _figures(signal: Tensor, noise: Tensor, where: Tensor, suffix: str) -> dict[str, float]:
    """where: bool [B, T]"""
    s, n = (float(value[where].double().square().mean().sqrt()) for value in (signal, noise))
    return {f"signal{suffix}": s, f"noise{suffix}": n, f"snr_db{suffix}": decibels(s, n)}


def _read(prompts: Prompts) -> Tensor:
    """bool [B, T]: the positions that the metric reads."""
    where = torch.zeros_like(prompts.clean, dtype=torch.bool)
    rows = torch.arange(len(prompts), device=where.device)[:, None].expand_as(prompts.read)
    where[rows[prompts.read_mask], prompts.read[prompts.read_mask]] = True
    return where


def _effect(measure: Metric, removed: Removal) -> float:
    full, cut = (float(measure(read)[0]) for read in (removed.full_read, removed.cut_read))
    return cut - full
