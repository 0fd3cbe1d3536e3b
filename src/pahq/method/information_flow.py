"""Information-flow routes: how much of a receiver's input each sender makes up, followed down from the prediction.

Ferrando & Voita 2024 (arXiv 2403.00824). The importance of a part z of a sum y is its proximity to the sum,

    max(0, |y|_1 - |y - z|_1), divided by the same of all parts together

(by their lengths |z|_1 where that is 0 for all), position by position in the clean run alone: no gradient, no
corrupted run, no metric. The parts of what a receiver reads are its senders (attention's output biases belong to
none). Routes start at the positions the prediction is read from and lead down: an MLP passes on what reaches it to
its own input; a head passes it on to the inputs of its keys and values at the positions it attends to, by the
importance of their terms in what the head writes, and to the input of its query where the query is. q, k and v of a
head read the same stream, so they have the same shares of it.
A direct edge carries all that its receiver's input edges do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from pahq.engine.reference import Run, run
from pahq.errors import PahqError
from pahq.graph import Graph, Receiver, Sender
from pahq.method.base import NoWork, Problem, Scores, Work
from pahq.model.transformer import Transformer
from pahq.precision.differentiable import computed
from pahq.task.prompts import Prompts, check_padding

Combine = Literal["flow", "bottleneck", "local"]


@dataclass(frozen=True)
class InformationFlowOptions:
    """combine: how an edge's share becomes its importance for the prediction, averaged over examples.

        ``flow``: shares multiply along routes and add up over them, so that each example's prediction hands down 1 in
        all; what reaches a head is divided equally among q, k and v. ``bottleneck``: the smallest share on the best
        route through it, at its best position, which is the largest threshold at which the paper's routes still hold
        it. ``local``: the share alone, mean over positions.
    tau: shares up to this are on no route, from 0 (all are) to 1.
    """

    combine: Combine = "flow"
    tau: float = 0.0

    def __post_init__(self) -> None:
        if self.combine not in get_args(Combine):
            raise PahqError(
                f"information-flow: combine '{self.combine}' is unknown; choose one of {', '.join(get_args(Combine))}"
            )
        if not isinstance(self.tau, int | float) or not 0 <= self.tau < 1:
            raise PahqError(f"information-flow: tau is {self.tau}; it must be at least 0 and below 1")


@torch.no_grad()
def information_flow_scores(
    problem: Problem, options: InformationFlowOptions | None = None, work: Work | None = None
) -> Scores:
    """Importance of every edge, 0 to 1. Raises PahqError for padding that the model would attend to."""
    options, work = options or InformationFlowOptions(), work or NoWork()
    graph, prompts = problem.graph, problem.prompts
    check_padding(prompts, problem.model.config)
    model = computed(problem.model, problem.policy)
    total, done = torch.zeros(graph.shape, dtype=torch.float64), 0
    kept = work.load()
    if kept is not None:
        total, done = kept[0]["total"], int(kept[1]["examples"])
    layers = model.config.n_layers
    step = max(1, int(problem.memory_limit / _bytes(model, graph, prompts)))
    while done < len(prompts):
        work.progress(done * layers, len(prompts) * layers)
        shares = _Shares(model, prompts[done : done + step], graph, problem.memory_limit)
        for layer in shares.walk():
            work.progress(done * layers + len(shares.prompts) * (layer + 1), len(prompts) * layers)
        total += _Routes(shares, options).scores().cpu()
        done += len(shares.prompts)
        work.save({"total": total}, {"examples": done})
    work.progress(len(prompts) * layers, len(prompts) * layers)
    values = (total / len(prompts)).numpy()
    if options.combine == "local" and graph.direct_edges:
        for row, receiver in enumerate(graph.receivers):
            if receiver.is_attention:
                values[row, graph.direct] = max(
                    values[:, graph.sender_index[Sender("head", receiver.layer, head)]].max()
                    for head in graph.heads_of(receiver)
                )
    notes = [f"information flow looks at the clean run alone: metric '{problem.metric}' and ablation play no part"]
    if problem.policy.differences:
        notes.append(f"policy '{problem.policy.name}' quantises differences; without any, all was computed in FP32")
    natural = float(options.tau) if options.tau and options.combine != "flow" else None
    return Scores(
        graph, values, "information-flow", signed=False, natural=natural, notes=tuple(notes), stats={"examples": done}
    )


def proximity(parts: Tensor, whole: Tensor) -> Tensor:
    """parts [K, ..., d] of sums whole [..., d] -> their shares of it [K, ...], which sum to 1.

    Where no part is near the sum, as when they all but cancel, shares go by the parts' own lengths.
    """
    near = torch.linalg.vector_norm(whole - parts, ord=1, dim=-1)
    near = (whole.abs().sum(-1) - near).clamp_(min=0)
    total = near.sum(0)
    if bool((total == 0).any()):
        near = torch.where(total > 0, near, torch.linalg.vector_norm(parts, ord=1, dim=-1))
        total = near.sum(0)
    return near / total.clamp(min=torch.finfo(near.dtype).tiny)


class _Shares:
    """Shares of all senders in what is read, for some examples: before thresholds.

    attention, mlp [L] of [upstream, N, T], final [senders, N, T]. tokens [L] of [H, N, T, T']: of the values at
    positions T' in what each head writes at T.
    """

    def __init__(self, model: Transformer, prompts: Prompts, graph: Graph, memory_limit: int) -> None:
        self.model, self.prompts, self.graph, self.limit = model, prompts, graph, memory_limit
        self.attention: list[Tensor] = []
        self.mlp: list[Tensor] = []
        self.tokens: list[Tensor] = []

    def walk(self) -> Iterator[int]:
        """Computes them from the embeddings up, and tells the layers that are over."""
        model, graph, cfg = self.model, self.graph, self.model.config
        clean = run(model, self.prompts.clean, graph.split_pos)
        senders = clean.final.new_empty((len(graph.senders), *clean.final.shape))
        senders[0] = clean.embed
        if clean.pos_embed is not None:
            senders[1] = clean.pos_embed
        for layer in range(cfg.n_layers):
            first = graph.sender_index[Sender("head", layer)]
            self.attention.append(proximity(senders[:first], clean.attn_in[layer]))
            heads = senders[first : first + cfg.n_heads]
            heads[:] = model.blocks[layer].attn.write_each(clean.z[layer])
            self.tokens.append(self._tokens(clean, layer, heads))
            if cfg.d_mlp:
                upstream = graph.n_upstream(Receiver("mlp", layer))
                self.mlp.append(proximity(senders[:upstream], clean.mlp_in[layer]))
                senders[graph.sender_index[Sender("mlp", layer)]] = clean.mlp[layer]
            yield layer
        self.final = proximity(senders, clean.final)

    def _tokens(self, clean: Run, layer: int, heads: Tensor) -> Tensor:
        """Shares [H, N, T, T'] of the terms pattern * value @ W_O in what heads write [H, N, T, d]."""
        model = self.model
        pattern = model.attention(clean.q[layer], clean.k[layer]).transpose(0, 1)
        values = model.blocks[layer].attn.write_each(model.by_head(clean.v[layer]))
        out = torch.empty_like(pattern)
        step = max(1, self.limit // (4 * values.nbytes))
        for begin in range(0, pattern.shape[2], step):
            rows = slice(begin, begin + step)
            terms = pattern[:, :, rows].permute(3, 0, 1, 2)[..., None] * values.permute(2, 0, 1, 3)[:, :, :, None]
            out[:, :, rows] = proximity(terms, heads[:, :, rows]).permute(1, 2, 3, 0)
        return out


class _Routes:
    """Follows shares of some examples from the prediction down. Levels: what reaches a node at a position [N, T]."""

    def __init__(self, shares: _Shares, options: InformationFlowOptions) -> None:
        self.shares, self.graph, self.options = shares, shares.graph, options
        prompts, cfg = shares.prompts, shares.graph.config
        self.flows, self.local = options.combine == "flow", options.combine == "local"
        valid = torch.ones_like(prompts.clean, dtype=torch.bool) if prompts.pad is None else ~prompts.pad
        self.everywhere = valid.double() / valid.sum(-1, keepdim=True)
        weight = prompts.read_mask.double()
        if self.flows or self.local:
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
        level = torch.zeros_like(self.everywhere)
        how = "sum" if self.flows or self.local else "amax"
        self.start = level.scatter_reduce(1, prompts.read, weight, how)
        self.reached = torch.zeros_like(shares.final, dtype=torch.float64)
        self.out = torch.zeros(self.graph.shape, dtype=torch.float64, device=level.device)
        self.third = 1 / 3 if self.flows else 1.0
        self.layers = range(cfg.n_layers)

    def scores(self) -> Tensor:
        """Importance of all edges summed over the examples, float64 [R, S + 1]."""
        graph, cfg = self.graph, self.graph.config
        self._edges(Receiver("logits", cfg.n_layers), self.shares.final, self.start)
        for layer in reversed(self.layers):
            if cfg.d_mlp:
                level = self.reached[graph.sender_index[Sender("mlp", layer)]]
                self._edges(Receiver("mlp", layer), self.shares.mlp[layer], level)
            self._heads(layer)
        return self.out

    def _heads(self, layer: int) -> None:
        """All edges into the attention of a layer."""
        graph, cfg = self.graph, self.graph.config
        first = graph.sender_index[Sender("head", layer)]
        queries = self.reached[first : first + cfg.n_heads] * self.third  # [H, N, T]
        tokens = self._cut(self.shares.tokens[layer]).double()
        if self.flows:
            keys = (queries[..., None] * tokens).sum(-2)
        else:
            keys = torch.minimum(queries[..., None], tokens).amax(-2)
        for receiver in graph.receivers:
            if receiver.layer != layer or not receiver.is_attention:
                continue
            heads = list(graph.heads_of(receiver))
            parts = {"q": [queries[heads]], "qkv": [queries[heads], keys[heads], keys[heads]]}
            levels = torch.cat(parts.get(receiver.kind, [keys[heads]]))
            level = levels.sum(0) if self.flows else levels.amax(0)
            self._edges(receiver, self.shares.attention[layer], level)

    def _edges(self, receiver: Receiver, share: Tensor, level: Tensor) -> None:
        """Scores one receiver's edges from shares [upstream, N, T], and lets them reach their senders."""
        row, upstream = self.graph.receiver_index[receiver], len(share)
        share = self._cut(share).double()
        if self.local:
            where = self.start if receiver.kind == "logits" else self.everywhere
            self.out[row, :upstream] = (share * where).sum((-1, -2))
            return
        edge = share * level if self.flows else torch.minimum(share, level)
        best = self._over_positions(edge)
        self.out[row, :upstream] = best
        if receiver.is_attention and self.graph.direct_edges:
            self.out[row, self.graph.direct] = self._over_positions(level)
        reached = self.reached[:upstream]
        self.reached[:upstream] = reached + edge if self.flows else torch.maximum(reached, edge)

    def _over_positions(self, edge: Tensor) -> Tensor:
        """[..., N, T] -> [...]: over positions as routes combine, summed over the examples."""
        return (edge.sum(-1) if self.flows else edge.amax(-1)).sum(-1)

    def _cut(self, share: Tensor) -> Tensor:
        return share if not self.options.tau else torch.where(share > self.options.tau, share, 0.0)


def _bytes(model: Transformer, graph: Graph, prompts: Prompts) -> int:
    """Memory for one example: senders, their distances from a sum, shares, and what the run keeps."""
    cfg, tokens = model.config, prompts.clean.shape[1]
    senders = len(graph.senders)
    elements = (2 * senders + 4 * cfg.n_layers) * tokens * cfg.d_model
    elements += (2 * cfg.n_layers + 3) * senders * tokens + cfg.n_layers * cfg.n_heads * tokens * tokens
    elements += cfg.n_layers * (2 * cfg.n_heads + 2 * cfg.n_kv_heads) * tokens * cfg.d_head + tokens * cfg.d_mlp
    return elements * model.dtype.itemsize * 4 // 3  # a part of the limit is left to the terms of heads
