"""What an engine is made of, under any precision policy: runs, base state, arithmetic and metric."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pahq.engine.arithmetic import Arithmetic
from pahq.engine.chains import Chains
from pahq.engine.differences import Differences, Gap
from pahq.engine.flops import KEPT, Flops
from pahq.engine.nodes import Nodes
from pahq.engine.reference import Run, reference_run, run
from pahq.engine.screen import Screen, worth_screening
from pahq.engine.spans import Spans, gather
from pahq.engine.start import circuit_run
from pahq.engine.state import State
from pahq.engine.vocabulary import Vocabulary
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.model.transformer import Transformer
from pahq.precision.formats import Format, round_to
from pahq.precision.policy import Policy
from pahq.precision.schedule import Scheduler
from pahq.precision.store import WeightStore
from pahq.precision.streamed import StreamedBlocks
from pahq.precision.values import rounded_model
from pahq.task.metrics import Metric, Readout, get_metric
from pahq.task.prompts import Prompts


@dataclass(frozen=True)
class Arithmetics:
    """plain: every state by itself; chains: differences of states in low precision, FP32 sums."""

    nodes: Nodes
    plain: Arithmetic
    chains: Arithmetic
    state: State
    metric: Metric
    vocabulary: Vocabulary
    store: WeightStore


@torch.no_grad()
def setup(
    model: Transformer,
    prompts: Prompts,
    graph: Graph,
    metric_name: str,
    ablation: str,
    screen: bool | None,
    policy: Policy,
    flops: Flops,
    scheduler: Scheduler | None = None,
    start: np.ndarray | None = None,
) -> Arithmetics:
    """See ``engine.Engine``. The metric's reference is always the FP32 full model's output, whatever the policy."""
    policy.require(model.device, model.dtype)
    if start is not None and policy.values:
        raise PahqError(
            f"policy '{policy.name}': rounds values, with which a sweep starts from the full model; "
            "leave the prefilter out, or take fp32, pahq, bf16 or int8"
        )
    if scheduler is None and isinstance(model.blocks, StreamedBlocks):
        scheduler = model.blocks.scheduler
    store = WeightStore(model, policy)
    spans = Spans.of(prompts, model.config, ablation, graph.split_pos)
    exact = Nodes(model, spans, flops)
    computes = rounded_model(model, policy, store) if policy.values else model
    nodes = Nodes(computes, spans, flops) if policy.values else exact
    clean = run(computes, prompts.clean, graph.split_pos)
    reference = reference_run(computes, prompts, ablation, graph.split_pos)
    own = run(model, prompts.clean, graph.split_pos).final if policy.values else clean.final
    clean_logits = model.unembed(gather(own, prompts.read))
    if start is not None:
        clean = circuit_run(model, prompts, graph, start, reference)
    metric = get_metric(metric_name, prompts, clean_logits)
    rounds_metric = policy.values and not policy.format("metric").is_exact
    if rounds_metric:
        metric = round_metric(metric, policy.format("metric"))
        screen = False
    if screen is None:
        screen = metric.sums_vocabulary and worth_screening(model, prompts.read.numel())
    unembed = policy.format("unembed") if policy.differences else None
    vocabulary = Vocabulary(
        computes,
        torch.logsumexp(clean_logits, -1),
        metric.weight,
        flops,
        Screen(computes, flops, unembed) if screen else None,
        rounds_metric,
    )
    gap, rough = None, None
    if policy.values:
        heads = exact if policy.sender_under_test else None
        others = heads if policy.others_under_test else None
        gap = _gap_of_values(graph, clean, reference, nodes, heads, others, ablation)
    elif policy.differences and not policy.sender_under_test:
        low = _gap_of_differences(graph, clean, reference, store, flops)
        rough = Differences(graph, clean, reference, spans, nodes, low)
    differences = Differences(graph, clean, reference, spans, nodes, gap)
    state = State(graph, clean, reference, spans, nodes, differences, rough, start)
    if policy.values:
        fine = exact if policy.receiver_under_test else None
        plain = Arithmetic(
            graph, nodes, fine, policy.others_under_test, rounds=True, residual=policy.format("residual")
        )
        return Arithmetics(nodes, plain, plain, state, metric, vocabulary, store)
    plain = Arithmetic(graph, nodes, keeps=policy.differences)
    return Arithmetics(nodes, plain, Chains(graph, nodes, state, store, scheduler), state, metric, vocabulary, store)


def round_metric(metric: Metric, fmt: Format) -> Metric:
    """The metric with every position's value rounded."""
    exact = metric.per_position

    def per_position(read: Readout) -> Tensor:
        return round_to(exact(read).float().unsqueeze(-1), fmt).squeeze(-1)

    metric.per_position = per_position  # type: ignore[method-assign]  (this one metric alone: its class stays)
    return metric


def _gap_of_differences(graph: Graph, clean: Run, reference: Run, store: WeightStore, flops: Flops) -> Gap:
    """Senders' differences with the heads' output weights in low precision."""

    def gap(column: int) -> Tensor:
        sender = graph.senders[column]
        change = clean.sender(sender) - reference.sender(sender)
        if sender.kind != "head":
            return change
        flops.add(KEPT, change.numel() * store.model.config.d_model)
        return store.matrix("o", sender.layer, sender.index).multiply(change)

    return gap


def _gap_of_values(
    graph: Graph,
    clean: Run,
    reference: Run,
    nodes: Nodes,
    exact: Nodes | None,
    others: Nodes | None,
    ablation: str,
) -> Gap:
    """Senders' differences as rounded values; a sending head under test is FP32 from its residual stream on.

    exact: nodes in FP32 for such heads, others: for such MLPs; None leaves them in low precision.

    (Only for the receiver under test: what everything else reads from that head stays in low precision.)
    """

    def value(run_: Run, column: int, own: bool) -> Tensor:
        sender = graph.senders[column]
        value = run_.sender(sender)
        if sender.kind == "mlp" and others is not None and own:
            return others.mlp(run_.mlp_in[sender.layer], sender.layer)
        if sender.kind != "head":
            return value
        if exact is None:
            return nodes.write(value, sender.layer, sender.index, KEPT)
        if own:
            value = _head(exact.model, run_.attn_in[sender.layer], sender.layer, sender.index)
        return exact.write(value, sender.layer, sender.index, KEPT)

    def gap(column: int) -> Tensor:
        return value(clean, column, True) - value(reference, column, ablation == "resample")

    return gap


def _head(model: Transformer, x: Tensor, layer: int, head: int) -> Tensor:
    """One head of a layer from the residual stream [B, T, d] before it -> z [B, T, dh]."""
    where = torch.arange(x.shape[1], device=x.device)
    attn, group = model.blocks[layer].attn, head // model.config.group_size
    q, k, v = (
        attn.project(model.attn_input(x, layer, which, where), which, index)[:, None]
        for which, index in (("q", head), ("k", group), ("v", group))
    )
    return model.attend(q, k, v, shared=False)[:, 0]
