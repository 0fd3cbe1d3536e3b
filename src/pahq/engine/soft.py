"""The model with a gate on every edge, differentiable: what gradient-based methods stand on.

A gate g of an addition edge scales what the sender adds beyond its value in the reference run; a gate of a direct
edge mixes the query (key, value) with the reference run's. Gates of 1 are the clean model, gates of 0 the reference
run, gates of 0 and 1 a circuit (``full.patched_logits``). The derivative of a metric with respect to a gate is

    dM/dg = < dM/d(receiver's input), sender - sender in the reference run >

so minus that is the first-order effect of removing the edge (attribution patching: Syed et al. 2023). Senders are
kept once, in one buffer that all receivers read: autograd alone would copy it for every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pahq.engine.reference import Run
from pahq.graph import Graph, Receiver, Sender
from pahq.graph.nodes import ReceiverKind
from pahq.model.transformer import Transformer
from pahq.task.prompts import Prompts, check_padding


class Senders:
    """What all senders write beyond the reference run, and the metric's gradient with respect to it.

    now, gradient, scored: [senders, N, T, d]. scored: the differences that gates' gradients are taken with, by
    default those of the pass itself (``now``).
    """

    def __init__(self, count: int, shape: torch.Size, like: Tensor, scored: Tensor | None = None) -> None:
        self.now = like.new_zeros((count, *shape))
        self.gradient: Tensor | None = None
        self.scored = self.now if scored is None else scored

    def add_gradient(self, upstream: int, gates: Tensor, grad: Tensor) -> None:
        """gates [R, upstream] of receivers whose inputs have the gradient [R, n]."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.now)
        self.gradient[:upstream].flatten(1).addmm_(gates.T, grad)


class _Write(Function):
    """Puts a node's output into the buffer. The token stands for the buffer's content in autograd's order."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, token: Tensor, senders: Senders, column: int) -> Tensor:
        ctx.senders, ctx.where = senders, slice(column, column + len(change))
        senders.now[ctx.where] = change
        return token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        gradient = ctx.senders.gradient
        return None if gradient is None else gradient[ctx.where], grad, None, None


class _Read(Function):
    """Inputs of some receivers: reference [B, T, d] + gates [R, upstream] @ senders -> [R, N, T, d]."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, token: Tensor, senders: Senders, reference: Tensor) -> Tensor:
        upstream = gates.shape[1]
        ctx.senders, ctx.shape = senders, token.shape
        ctx.save_for_backward(gates)
        out = gates @ senders.now[:upstream].flatten(1)
        return out.view(-1, *senders.now.shape[1:]).add_(reference)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gates,) = ctx.saved_tensors
        flat, upstream = grad.flatten(1), gates.shape[1]
        ctx.senders.add_gradient(upstream, gates, flat)
        return flat @ ctx.senders.scored[:upstream].flatten(1).T, grad.new_zeros(ctx.shape), None, None


class SoftPass:
    """Differentiable passes over one set of prompts.

    reference: the run of ``reference_run`` for these prompts. model: may round (``precision``), as long as its
    parts can be differentiated.
    """

    def __init__(self, model: Transformer, prompts: Prompts, graph: Graph, reference: Run) -> None:
        check_padding(prompts, model.config)
        self.model, self.prompts, self.graph, self.ref = model, prompts, graph, reference
        self.rows = _rows(graph)

    def logits(
        self,
        gates: Tensor,
        embedding: float = 1.0,
        scored: Tensor | None = None,
        noise: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, Senders]:
        """Logits [N, P, V] at the positions read, and the senders' buffer. ``gates`` get gradients.

        gates: [n_receivers, n_senders + 1], those of direct edges in the last column (1 where there is none).
        embedding: how far the embeddings stand from the reference run (0) to these prompts (1).
        scored: [senders, N, T, d], see ``Senders``. noise: column of a sender -> what is added to its value
        beyond the reference run [N, T, d].
        """
        model, graph, ref, prompts = self.model, self.graph, self.ref, self.prompts
        shape = torch.Size((*prompts.clean.shape, model.config.d_model))
        senders = Senders(len(graph.senders), shape, model.W_E, scored)
        self.gates, self.senders, self.noise = gates, senders, noise or {}
        self.token = torch.zeros((), dtype=model.dtype, device=model.device, requires_grad=True)
        embed, pos = model.embed(prompts.clean)
        parts = [embed]
        if pos is not None:
            parts = [embed, pos[None]] if graph.split_pos else [model.add(embed, pos)]
        for column, value in enumerate(parts):
            gap = value - ref.sender(graph.senders[column])
            self._write((embedding * gap).expand(shape)[None], column)
        where = torch.arange(prompts.clean.shape[1], device=model.device)
        for layer in range(model.config.n_layers):
            self._layer(layer, where)
        (final,) = self._read([graph.receiver_index[Receiver("logits", model.config.n_layers)]], ref.final)
        example = torch.arange(len(prompts), device=model.device)[:, None]
        return model.unembed(final[example, prompts.read]), senders

    def _write(self, change: Tensor, column: int) -> None:
        extra = [self.noise.get(at) for at in range(column, column + len(change))]
        if any(one is not None for one in extra):
            change = torch.stack([one if add is None else one + add for one, add in zip(change, extra, strict=True)])
        self.token = _Write.apply(change, self.token, self.senders, column)

    def _read(self, rows: list[int], reference: Tensor) -> Tensor:
        """Inputs of receivers of one kind and layer: [rows, N, T, d]."""
        upstream = self.graph.n_upstream(self.graph.receivers[rows[0]])
        out = _Read.apply(self.gates[rows, :upstream], self.token, self.senders, reference)
        assert isinstance(out, Tensor)
        return out

    def _layer(self, layer: int, where: Tensor) -> None:
        model, graph, ref, block = self.model, self.graph, self.ref, self.model.blocks[layer]
        inputs = {kind: self._read(rows, ref.attn_in[layer]) for kind, rows in self.rows[layer].items()}
        q, k, v = (self._computed(inputs, layer, which, where) for which in "qkv")
        z = model.attend(q, k, v)
        written = block.attn.write_each(z) - block.attn.write_each(ref.z[layer])
        shape = self.senders.now.shape[1:]
        self._write(written.expand(-1, *shape), graph.sender_index[Sender("head", layer)])
        if block.mlp is not None and block.ln2 is not None:
            read = self._read([graph.receiver_index[Receiver("mlp", layer)]], ref.mlp_in[layer])[0]
            out = block.mlp(block.ln2(read)) - ref.mlp[layer]
            self._write(out[None], graph.sender_index[Sender("mlp", layer)])

    def _computed(self, inputs: dict[str, Tensor], layer: int, which: str, where: Tensor) -> Tensor:
        """q of all heads, or k or v of all groups, before the rotary turn: [N, heads, T, dh]."""
        graph, cfg, attn = self.graph, self.model.config, self.model.blocks[layer].attn
        kind = which if graph.split_qkv else "qkv"
        x = self.model.attn_input(inputs[kind], layer, which, where)
        gate = self.gates[self.rows[layer][kind], graph.direct]
        if which == "q" and kind == "qkv":  # a group's input feeds all its heads
            x, gate = (t.repeat_interleave(cfg.group_size, dim=0) for t in (x, gate))
        out = attn.project_each(x, which)
        fallback = {"q": self.ref.q, "k": self.ref.k, "v": self.ref.v}[which][layer]
        if not graph.direct_edges:
            return out
        return torch.lerp(fallback.expand_as(out), out, gate[:, None, None].to(out.dtype))


def _rows(graph: Graph) -> list[dict[str, list[int]]]:
    """For each layer, the rows of its attention receivers by kind."""
    cfg = graph.config
    kinds: tuple[ReceiverKind, ...] = ("q", "k", "v") if graph.split_qkv else ("qkv",)
    counts = {kind: cfg.n_heads if kind == "q" else cfg.n_kv_heads for kind in kinds}
    return [
        {kind: [graph.receiver_index[Receiver(kind, layer, i)] for i in range(counts[kind])] for kind in kinds}
        for layer in range(cfg.n_layers)
    ]
