"""ACDC the slow way: one whole forward pass for every tested edge, head by head, sender by sender.

Nothing is shared with the engine, and the maths of a block is written out again from its definition,
so that agreement means something. Reads the weights of a ``Transformer``, the indices of a ``Graph``
and the tokens of ``Prompts``, no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pahq.graph import Graph, Receiver, Sender
from pahq.model.transformer import Transformer
from pahq.task.prompts import Prompts


@dataclass
class Run:
    """What one forward pass computed. Every value is [B, T, something].

    senders: what each sender wrote; inputs: the residual stream each receiver read;
    computed: q of head, k and v of group, under (layer, "q" | "k" | "v", index), before the rotary turn.
    """

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    senders: dict[Sender, Tensor] = field(default_factory=dict)
    inputs: dict[Receiver, Tensor] = field(default_factory=dict)
    computed: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)


@dataclass
class Patch:
    """Which edges are present, whose inputs are put together from them, and what stands in for the rest."""

    mask: np.ndarray
    visited: set[Receiver]
    reference: Run


class Step(NamedTuple):
    """One tested edge; the fields of ``pahq.method.acdc.Decision``."""

    order: int
    row: int
    column: int
    before: float
    after: float
    kept: bool

    @property
    def effect(self) -> float:
        return self.after - self.before


@dataclass
class Sweep:
    """What a run of ACDC found: mask, effects and order are [n_receivers, n_senders + 1]."""

    graph: Graph
    mask: np.ndarray
    effects: np.ndarray
    order: np.ndarray
    decisions: list[Step]
    metric: float


# --- the forward pass -------------------------------------------------------------------------------------


def norm(x: Tensor, kind: str, eps: float, w: Tensor | None, b: Tensor | None) -> Tensor:
    if kind == "none":
        return x
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    x = x if w is None else x * w
    return x if b is None else x + b


def activation(x: Tensor, act: str) -> Tensor:
    if act == "relu":
        return x * (x > 0)
    if act == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if act == "gelu_new":
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    if act == "gelu_quick":
        return x / (1 + torch.exp(-1.702 * x))
    if act == "silu":
        return x / (1 + torch.exp(-x))
    assert act in ("solu", "solu_ln")
    e = torch.exp(x - x.max(-1, keepdim=True).values)
    return x * e / e.sum(-1, keepdim=True)


def turn(x: Tensor, model: Transformer) -> Tensor:
    """Rotary positions: the pair (a, b) of coordinates is the complex number a + ib, times e^(i angle)."""
    cfg, table = model.config, model.rotary
    if table is None:
        return x
    out = x.clone()
    for pair in range(cfg.rotary_dim // 2):
        i, j = (2 * pair, 2 * pair + 1) if cfg.rotary_interleaved else (pair, pair + cfg.rotary_dim // 2)
        # tabulated in single precision; a table computed anew could differ in the last digit
        cos, sin = (t[: x.shape[1], pair].to(x.dtype) for t in (table.cos, table.sin))
        out[..., i] = x[..., i] * cos - x[..., j] * sin
        out[..., j] = x[..., i] * sin + x[..., j] * cos
    return out


def receiver_of(graph: Graph, layer: int, which: str, head: int) -> Receiver:
    """Who reads the residual stream for the q of ``head``, or the k or v of its group."""
    group = head // graph.config.group_size
    if not graph.split_qkv:
        return Receiver("qkv", layer, group)
    return Receiver("q", layer, head) if which == "q" else Receiver(which, layer, group)  # pyright: ignore


@torch.no_grad()
def forward(
    model: Transformer,
    graph: Graph,
    tokens: Tensor,
    patch: Patch | None = None,
    positions: Tensor | None = None,
    zeroed: bool = False,
) -> Run:
    """One pass over ``tokens`` [B, T]. ``zeroed``: whatever a sender writes becomes zero."""
    cfg, weights, run = model.config, model.weights, Run()
    n_tokens = tokens.shape[1]
    stream = torch.zeros(*tokens.shape, cfg.d_model, dtype=model.dtype)

    def write(sender: Sender, value: Tensor) -> Tensor:
        run.senders[sender] = torch.zeros_like(value) if zeroed else value
        return stream + run.senders[sender]

    def read(receiver: Receiver, residual: Tensor) -> Tensor:
        """The receiver's input, given the ordinary residual stream of this pass."""
        if patch is not None and receiver in patch.visited:
            row = graph.receiver_index[receiver]
            residual = patch.reference.inputs[receiver].expand_as(residual)
            for column in range(graph.n_upstream(receiver)):
                if patch.mask[row, column]:
                    sender = graph.senders[column]
                    residual = residual + (run.senders[sender] - patch.reference.senders[sender])
        run.inputs[receiver] = residual
        return residual

    def get(name: str) -> Tensor | None:
        return weights.get(name)

    def normed(x: Tensor, name: str, kind: str = cfg.norm) -> Tensor:
        return norm(x, kind, cfg.norm_eps, get(f"{name}.w"), get(f"{name}.b"))

    where = torch.arange(n_tokens) if positions is None else positions
    token = weights["embed.W_E"][tokens]
    if cfg.positions == "learned":
        place = weights["pos_embed.W_pos"][where].expand_as(token)
        if graph.split_pos:
            stream = write(Sender("embed", -1), token)
            stream = write(Sender("pos_embed", -1), place)
        else:
            stream = write(Sender("embed", -1), token + place)
    else:
        stream = write(Sender("embed", -1), token)

    distance = torch.arange(n_tokens)[:, None] - torch.arange(n_tokens)
    visible = torch.ones(n_tokens, n_tokens, dtype=torch.bool)
    if cfg.causal:
        visible &= distance >= 0
    if cfg.window is not None:
        visible &= distance.abs() < cfg.window

    def project(which: str, head: int, layer: int, before: Tensor) -> Tensor:
        at, index = f"blocks.{layer}", head if which == "q" else head // cfg.group_size
        if (layer, which, index) in run.computed:
            return run.computed[layer, which, index]
        receiver = receiver_of(graph, layer, which, head)
        x = run.inputs[receiver] if receiver in run.inputs else read(receiver, before)
        x = normed(x, f"{at}.ln1")
        if cfg.positions == "shortformer" and which != "v":
            x = x + weights["pos_embed.W_pos"][:n_tokens]
        x = x @ weights[f"{at}.attn.W_{which.upper()}"][index]
        bias = get(f"{at}.attn.b_{which.upper()}")
        x = x if bias is None else x + bias[index]
        if cfg.qk_norm and which != "v":
            x = normed(x, f"{at}.attn.{which}_norm", "rms")
        row = graph.receiver_index[receiver]
        if patch is not None and graph.direct_edges and not patch.mask[row, graph.direct]:
            x = patch.reference.computed[layer, which, index].expand_as(x)
        run.computed[layer, which, index] = x
        return x

    for layer in range(cfg.n_layers):
        at = f"blocks.{layer}"
        before = stream
        for head in range(cfg.n_heads):
            q, k, v = (project(which, head, layer, before) for which in "qkv")
            q, k = turn(q, model), turn(k, model)
            scores = q @ k.transpose(1, 2) * (cfg.attn_scale if cfg.attn_scale is not None else cfg.d_head**-0.5)
            pattern = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1)
            stream = write(Sender("head", layer, head), pattern @ v @ weights[f"{at}.attn.W_O"][head])
        b_O = get(f"{at}.attn.b_O")  # belongs to no head, and is in every run
        stream = stream if b_O is None else stream + b_O

        if cfg.d_mlp:
            x = normed(read(Receiver("mlp", layer), before if cfg.parallel else stream), f"{at}.ln2")
            b_in, b_gate, b_out = (get(f"{at}.mlp.b_{part}") for part in ("in", "gate", "out"))
            hidden = x @ weights[f"{at}.mlp.W_in"]
            hidden = hidden if b_in is None else hidden + b_in
            if cfg.gated:
                gate = x @ weights[f"{at}.mlp.W_gate"]
                hidden = activation(gate if b_gate is None else gate + b_gate, cfg.act) * hidden
            else:
                hidden = activation(hidden, cfg.act)
            if cfg.act == "solu_ln":
                hidden = normed(hidden, f"{at}.mlp.ln", "layer")
            out = hidden @ weights[f"{at}.mlp.W_out"]
            stream = write(Sender("mlp", layer), out if b_out is None else out + b_out)

    final = normed(read(Receiver("logits", cfg.n_layers), stream), "ln_final")
    b_U = get("unembed.b_U")
    run.logits = final @ weights["unembed.W_U"]
    run.logits = run.logits if b_U is None else run.logits + b_U
    return run


def reference_run(model: Transformer, graph: Graph, prompts: Prompts, ablation: str) -> Run:
    """The pass whose values stand in for cut edges. Means have a batch dimension of 1."""
    if ablation == "zero":
        return forward(model, graph, prompts.corrupt, zeroed=True)
    if ablation == "resample":
        positions = None
        if graph.split_pos:
            positions = torch.randperm(prompts.corrupt.shape[1], generator=torch.Generator().manual_seed(49))
        return forward(model, graph, prompts.corrupt, positions=positions)
    assert ablation == "mean"
    run, mean = forward(model, graph, prompts.corrupt), Run()
    mean.senders = {sender: value.mean(0, keepdim=True) for sender, value in run.senders.items()}
    mean.computed = {key: value.mean(0, keepdim=True) for key, value in run.computed.items()}
    for receiver in graph.receivers:
        total = sum(mean.senders[sender] for sender in graph.senders[: graph.n_upstream(receiver)])
        last_b_O = receiver.layer + (receiver.kind == "mlp" and not graph.config.parallel)
        for layer in range(last_b_O):
            total = total + model.weights.get(f"blocks.{layer}.attn.b_O", torch.zeros(()))
        assert isinstance(total, Tensor)
        mean.inputs[receiver] = total
    return mean


# --- metrics ----------------------------------------------------------------------------------------------


def metric_value(name: str, logits: Tensor, clean: Tensor, prompts: Prompts) -> float:
    """``logits`` and ``clean`` [B, T, V], all positions; a mean over all positions that are read.

    l2:0,2 looks at output dimensions 0 and 2 only.
    """
    name, _, dims = name.partition(":")
    values, nll_clean = [], []
    for n in range(len(prompts)):
        for p in range(prompts.read.shape[1]):
            if not prompts.read_mask[n, p]:
                continue
            now, then = logits[n, prompts.read[n, p]], clean[n, prompts.read[n, p]]
            answers = [int(a) for a in prompts.answers[n, p] if a >= 0]
            wrong = [int(a) for a in prompts.wrong[n, p] if a >= 0]
            log_p, log_q = torch.log_softmax(then, -1), torch.log_softmax(now, -1)
            if name == "kl_div":
                value = sum(log_p.exp() * (log_p - log_q))
            elif name == "logit_diff":
                value = now[wrong].mean() - now[answers].mean()
            elif name == "docstring":
                value = now[wrong].max() - now[answers].mean()
            elif name == "greaterthan":
                value = log_q.exp()[wrong].sum() - log_q.exp()[answers].sum()
            elif name in ("nll", "match_nll"):
                value = -torch.logsumexp(log_q[answers], 0)
                nll_clean.append(-torch.logsumexp(log_p[answers], 0))
            else:
                assert name == "l2"
                chosen = [int(dim) for dim in dims.split(",")] if dims else list(range(len(now)))
                value = ((now - then) ** 2)[chosen].mean()
            values.append(float(value))
    value = sum(values) / len(values)
    return abs(value - float(sum(nll_clean)) / len(nll_clean)) if name == "match_nll" else value


# --- the sweep --------------------------------------------------------------------------------------------


def visits(graph: Graph) -> list[tuple[Receiver, str]]:
    """Receivers from the output back to the input, each with the kind of edge that is tested there."""
    cfg = graph.config
    out: list[tuple[Receiver, str]] = [(Receiver("logits", cfg.n_layers), "addition")]
    for layer in reversed(range(cfg.n_layers)):
        if cfg.d_mlp:
            out.append((Receiver("mlp", layer), "addition"))
        for edge in ("direct", "addition") if graph.direct_edges else ("addition",):
            for kind in ("v", "k", "q") if graph.split_qkv else ("qkv",):
                count = cfg.n_heads if kind == "q" else cfg.n_kv_heads
                out += [(Receiver(kind, layer, i), edge) for i in reversed(range(count))]
    return out


def sender_order(graph: Graph, receiver: Receiver, heads: str, senders: str) -> list[int]:
    """Columns of the senders of ``receiver`` in the order in which they are tested.

    Groups (a layer's MLP, a layer's heads, the token embedding, the position embedding) go latest first or
    the other way round; heads inside their group have an order of their own.
    """
    cfg = graph.config
    groups: list[list[Sender]] = []
    for layer in reversed(range(cfg.n_layers)):
        groups.append([Sender("mlp", layer)])
        order = range(cfg.n_heads) if heads == "ascending" else reversed(range(cfg.n_heads))
        groups.append([Sender("head", layer, head) for head in order])
    groups += [[Sender("embed", -1)], [Sender("pos_embed", -1)]]
    if senders == "earliest":
        groups.reverse()
    columns = [graph.sender_index[s] for group in groups for s in group if s in graph.sender_index]
    return [column for column in columns if graph.edges[graph.receiver_index[receiver], column]]


def reaches_output(graph: Graph, mask: np.ndarray, receiver: Receiver, edge: str) -> bool:
    """Is there a path of present edges from the receiver's input (its computed q, k or v for "direct")?"""
    if receiver.kind == "logits":
        return True
    row = graph.receiver_index[receiver]
    if receiver.kind == "mlp":
        own = [Sender("mlp", receiver.layer)]
    else:
        if edge == "addition" and graph.direct_edges and not mask[row, graph.direct]:
            return False
        own = [Sender("head", receiver.layer, head) for head in graph.heads_of(receiver)]
    for sender in own:
        for reader in np.flatnonzero(mask[:, graph.sender_index[sender]]):
            if reaches_output(graph, mask, graph.receivers[reader], "addition"):
                return True
    return False


def acdc(
    model: Transformer,
    prompts: Prompts,
    graph: Graph,
    threshold: float,
    metric: str = "kl_div",
    ablation: str = "resample",
    absolute: bool = False,
    head_order: str = "descending",
    sender_direction: str = "latest",
    start: np.ndarray | None = None,
    strength: np.ndarray | None = None,
) -> Sweep:
    """Sequential ACDC (Conmy et al. 2023), an edge and a whole forward pass at a time.

    start: the edges there are to begin with, all others being cut throughout. strength: a receiver's senders are
    tested from the least up.
    """
    clean = forward(model, graph, prompts.clean).logits
    mask, visited = graph.edges.copy(), set[Receiver]()
    if start is not None:
        mask, visited = start.copy(), set(graph.receivers)
    patch = Patch(mask, visited, reference_run(model, graph, prompts, ablation))
    effects, order = np.full(graph.shape, np.nan), np.full(graph.shape, -1)
    decisions: list[Step] = []

    def measure() -> float:
        return metric_value(metric, forward(model, graph, prompts.clean, patch).logits, clean, prompts)

    current = measure()
    for receiver, edge in visits(graph):
        row = graph.receiver_index[receiver]
        columns = [graph.direct] if edge == "direct" else sender_order(graph, receiver, head_order, sender_direction)
        columns = [column for column in columns if patch.mask[row, column]]
        if strength is not None:
            columns = sorted(columns, key=lambda column: strength[row, column])
        if edge == "addition":
            patch.visited.add(receiver)
        if not reaches_output(graph, patch.mask, receiver, edge):
            patch.mask[row, columns] = False
            continue
        for column in columns:
            patch.mask[row, column] = False
            after = measure()
            effect = after - current
            kept = not (abs(effect) if absolute else effect) < threshold
            effects[row, column], order[row, column] = effect, len(decisions)
            decisions.append(Step(len(decisions), row, column, current, after, kept))
            if kept:
                patch.mask[row, column] = True
            else:
                current = after
    return Sweep(graph, patch.mask, effects, order, decisions, current)


def circuit_logits(
    model: Transformer, prompts: Prompts, graph: Graph, mask: np.ndarray, ablation: str, visited: set[Receiver]
) -> Tensor:
    """Logits [B, T, V] of the model cut down to ``mask``."""
    patch = Patch(mask, visited, reference_run(model, graph, prompts, ablation))
    return forward(model, graph, prompts.clean, patch).logits
