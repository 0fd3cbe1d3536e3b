"""Whole passes with one edge removed from the full model, every residual stream kept: plain code, no shortcuts.

Shapes: B examples, T tokens, d = d_model, dh = d_head. Points of the residual stream are called ``a3`` (read by
layer 3's attention), ``m3`` (by its MLP) and ``final``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pahq.engine.reference import Run, reference_run, run
from pahq.engine.spans import gather
from pahq.graph import Graph, Receiver, Sender
from pahq.model.components import linear
from pahq.model.transformer import Transformer
from pahq.precision.policy import Policy
from pahq.precision.store import WeightStore
from pahq.precision.values import rounded_model
from pahq.task.metrics import LogitsReadout, Readout
from pahq.task.prompts import Prompts

Streams = dict[str, Tensor]
"""Name of a point -> residual stream there [B, T, d], in order of computation."""


@dataclass(frozen=True)
class Cut:
    """A removed edge: its receiver reads the residual stream less ``gap`` [B or 1, T, d]."""

    receiver: Receiver
    gap: Tensor

    def reads(self, kind: str, layer: int) -> bool:
        return (self.receiver.kind, self.receiver.layer) == (kind, layer)


class Pass(ABC):
    """The products of a pass, in one arithmetic or another."""

    def __init__(self, model: Transformer, base: Run) -> None:
        self.model, self.base = model, base

    @abstractmethod
    def project(self, x: Tensor, which: str, layer: int, index: int) -> Tensor:
        """Normalised input [B, T, d] -> q of a head, k or v of a group, before the rotary turn [B, T, dh]."""

    @abstractmethod
    def write(self, z: Tensor, layer: int) -> Tensor:
        """Heads' values [B, H, T, dh] -> what the layer's attention adds [B, T, d]."""

    @abstractmethod
    def mlp(self, x: Tensor, layer: int) -> Tensor:
        """Normalised input [B, T, d] -> what the MLP adds [B, T, d]."""

    def streams(self, cut: Cut | None) -> Streams:
        """One pass over the clean prompts, with an edge removed or with none."""
        model, cfg, found = self.model, self.model.config, Streams()
        x = self.base.embed if self.base.pos_embed is None else model.add(self.base.embed, self.base.pos_embed)
        for layer, block in enumerate(model.blocks):
            found[f"a{layer}"] = x
            q, k, v = (self._projected(x, which, layer, cut) for which in "qkv")
            middle = model.add(x, self.write(model.attend(q, k, v), layer))
            if block.mlp is not None and block.ln2 is not None:
                read = x if cfg.parallel else middle
                found[f"m{layer}"] = read
                inside = model.add(read, -cut.gap) if cut is not None and cut.reads("mlp", layer) else read
                middle = model.add(middle, self.mlp(block.ln2(inside), layer))
            x = middle
        found["final"] = model.add(x, -cut.gap) if cut is not None and cut.receiver.kind == "logits" else x
        return found

    def _projected(self, x: Tensor, which: str, layer: int, cut: Cut | None) -> Tensor:
        """q of all heads, k or v of all groups: [B, heads, T, dh]."""
        cfg = self.model.config
        where = torch.arange(x.shape[1], device=x.device)
        shared = self.model.attn_input(x, layer, which, where)
        values = []
        for index in range(cfg.n_heads if which == "q" else cfg.n_kv_heads):
            own = shared
            if cut is not None and cut.reads(which, layer) and cut.receiver.index == index:
                own = self.model.attn_input(self.model.add(x, -cut.gap), layer, which, where)
            values.append(self.project(own, which, layer, index))
        return torch.stack(values, dim=1)


class ValuePass(Pass):
    """Every value by itself, in the model's own arithmetic: FP32's, or that of a model that rounds."""

    def project(self, x: Tensor, which: str, layer: int, index: int) -> Tensor:
        return self.model.blocks[layer].attn.project(x, which, index)

    def write(self, z: Tensor, layer: int) -> Tensor:
        return self.model.blocks[layer].attn.write_all(z)

    def mlp(self, x: Tensor, layer: int) -> Tensor:
        mlp = self.model.blocks[layer].mlp
        assert mlp is not None
        return mlp(x)


class DifferencePass(Pass):
    """The FP32 pass without a cut, plus low-precision products of what differs from it."""

    def __init__(self, model: Transformer, base: Run, store: WeightStore) -> None:
        super().__init__(model, base)
        self.store = store

    def gap(self, sender: Sender, change: Tensor) -> Tensor:
        """A sender's clean value less the one that a removed edge falls back to -> the same as written [B, T, d]."""
        return change if sender.kind != "head" else self._low("o", sender.layer, sender.index, change)

    def _low(self, name: str, layer: int, index: int, change: Tensor) -> Tensor:
        return self.store.matrix(name, layer, index).multiply(change)

    def project(self, x: Tensor, which: str, layer: int, index: int) -> Tensor:
        weights, bias, norm = self.model.blocks[layer].attn.parts(which)
        where = torch.arange(x.shape[1], device=x.device)
        before = self.model.attn_input(self.base.attn_in[layer], layer, which, where)
        change = self._low(which, layer, index, x - before)
        if norm is not None:
            total = before @ weights[index] if bias is None else before @ weights[index] + bias[index]
            change = norm(total + change) - norm(total)
        return self.base.projected(which, layer, index) + change

    def write(self, z: Tensor, layer: int) -> Tensor:
        out = self.model.blocks[layer].attn.write_all(self.base.z[layer])
        for head in range(z.shape[1]):
            out = out + self._low("o", layer, head, z[:, head] - self.base.z[layer][:, head])
        return out

    def mlp(self, x: Tensor, layer: int) -> Tensor:
        block = self.model.blocks[layer]
        mlp, ln2 = block.mlp, block.ln2
        assert mlp is not None
        assert ln2 is not None
        before = ln2(self.base.mlp_in[layer])
        hidden = linear(before.flatten(0, 1), mlp.W_in, mlp.b_in).view(*x.shape[:-1], -1)
        now = hidden + self._low("mlp_in", layer, 0, x - before)
        gate = gate_now = None
        if mlp.W_gate is not None:
            gate = linear(before.flatten(0, 1), mlp.W_gate, mlp.b_gate).view(*x.shape[:-1], -1)
            gate_now = gate + self._low("mlp_gate", layer, 0, x - before)
        change = mlp.act_on(now, gate_now) - mlp.act_on(hidden, gate)
        return self.base.mlp[layer] + self._low("mlp_out", layer, 0, change)

    def logits(self, final: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Final residual stream [B, T, d] -> logits [B, P, V] at positions [B, P], by FP32 and by low products."""
        before, now = (self.model.unembed_input(gather(x, at)) for x in (self.base.final, final))
        low = before @ self.model.W_U + self._low("unembed", 0, 0, now - before)
        exact = now @ self.model.W_U
        bias = self.model.b_U
        return (exact, low) if bias is None else (exact + bias, low + bias)


@dataclass(frozen=True)
class Removal:
    """What removing an edge does in one arithmetic: streams, and what a metric reads, with the edge and without it."""

    full: Streams
    cut: Streams
    full_read: Readout
    cut_read: Readout


@torch.no_grad()
def removal(
    model: Transformer, prompts: Prompts, graph: Graph, edge: tuple[int, int], ablation: str, policy: Policy
) -> Removal:
    """Removes an addition edge (row, column) from the full model under a policy.

    Heads in ``policy.heads`` are FP32 in all passes; nothing else counts as under test here.
    """
    receiver, sender = graph.receivers[edge[0]], graph.senders[edge[1]]
    store = WeightStore(model, policy)
    computes = rounded_model(model, policy, store) if policy.values else model
    base = run(computes, prompts.clean, graph.split_pos)
    other = reference_run(computes, prompts, ablation, graph.split_pos)
    now, then = base.sender(sender), other.sender(sender)
    if policy.differences:
        chained = DifferencePass(model, base, store)
        cut = chained.streams(Cut(receiver, chained.gap(sender, now - then)))
        exact, low = chained.logits(cut["final"], prompts.read)
        full_read = LogitsReadout(model.unembed(gather(base.final, prompts.read)))
        return Removal(_streams_of(base, model), cut, full_read, _DifferenceReadout(exact, low))
    if sender.kind == "head":
        attn = computes.blocks[sender.layer].attn
        now, then = attn.write(now, sender.index), attn.write(then, sender.index)
    plain = ValuePass(computes, base)
    full, cut = plain.streams(None), plain.streams(Cut(receiver, now - then))
    reads = [LogitsReadout(computes.unembed(gather(streams["final"], prompts.read))) for streams in (full, cut)]
    return Removal(full, cut, reads[0], reads[1])


class _DifferenceReadout(LogitsReadout):
    """As the engine has it: single logits and fixed sums of them in FP32, sums over the vocabulary in low precision."""

    def __init__(self, exact: Tensor, low: Tensor) -> None:
        super().__init__(exact)
        self._low = LogitsReadout(low)

    def logsumexp(self) -> Tensor:
        return self._low.logsumexp()

    def logits(self) -> Tensor:
        return self._low.logits()


def _streams_of(base: Run, model: Transformer) -> Streams:
    """The streams that a run kept."""
    found = Streams()
    for layer in range(model.config.n_layers):
        found[f"a{layer}"] = base.attn_in[layer]
        if base.mlp_in:
            found[f"m{layer}"] = base.mlp_in[layer]
    return found | {"final": base.final}
