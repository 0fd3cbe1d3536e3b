"""The model with a gate on every edge, differentiable: what gradient-based methods stand on.

A gate g of an addition edge scales what the sender adds beyond its value in the reference run; a gate of a direct
edge mixes the query (key, value) with the reference run's. Gates of 1 are the clean model, gates of 0 the reference
run, gates of 0 and 1 a circuit (``full.patched_logits``). The derivative of a metric with respect to a gate is

    dM/dg = < dM/d(receiver's input), sender - sender in the reference run >

so minus that is the first-order effect of removing the edge (attribution patching: Syed et al. 2023). Senders are
kept once, in one buffer that all receivers read: autograd alone would copy it for every layer. With all gates at 1,
where first-order scores are taken, receivers read the sum of the senders that far, as in an ordinary pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pahq.engine.reference import Run
from pahq.errors import PahqError
from pahq.graph import Graph, Receiver, Sender
from pahq.graph.nodes import ReceiverKind
from pahq.model.transformer import Transformer
from pahq.precision.streamed import StreamedBlocks
from pahq.task.prompts import Prompts, check_padding


class Senders:
    """What all senders write beyond the reference run, and the metric's gradient with respect to it.

    now, gradient: [senders, N, T, d]; the gradient is None before the backward pass, and complete after it.
    direct: ("q", "k" or "v"; layer) -> what is computed beyond the reference run's [N, heads, T, dh].
    slopes: the same keys -> direct edges' gradients example by example [N, heads], once the backward pass is over.
    scored: another pass's, whose differences the gates' gradients are taken with instead of this one's own.
    """

    def __init__(self, count: int, shape: torch.Size, like: Tensor, scored: Senders | None = None) -> None:
        self.now = like.new_zeros((count, *shape))
        self.direct: dict[tuple[str, int], Tensor] = {}
        self.slopes: dict[tuple[str, int], Tensor] = {}
        self.gradient: Tensor | None = None
        self.scored = scored

    def add_gradient(self, upstream: int, gates: Tensor, grad: Tensor) -> None:
        """gates [R, upstream] of receivers whose inputs have the gradient [R, n]."""
        self.known_gradient()[:upstream].flatten(1).addmm_(gates.T, grad)

    def known_gradient(self) -> Tensor:
        """The gradient as far as it is known: [senders, N, T, d]"""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.now)
        return self.gradient

    def slope(self, upstream: int, grad: Tensor) -> Tensor:
        """Gradient [R, n] with respect to receivers' inputs -> with respect to their gates [R, upstream]."""
        differences = self.now if self.scored is None else self.scored.now
        return grad @ differences[:upstream].flatten(1).T


def _single(grads: tuple[Tensor, ...]) -> Tensor:
    """The gradient of a function's only output. Buffers are written on the way back, so there is one way back only."""
    assert not torch.is_grad_enabled(), "soft: there are no gradients of gradients"
    return grads[0]


class _Write(Function):
    """Puts a node's output into the buffer. The token stands for the buffer's content in autograd's order."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, token: Tensor, senders: Senders, column: int) -> Tensor:
        ctx.senders, ctx.where = senders, slice(column, column + len(change))
        senders.now[ctx.where] = change
        return token.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        grad = _single(grads)
        gradient = ctx.senders.gradient  # complete by now: all later reads hang on this token
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
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        grad = _single(grads)
        (gates,), senders = ctx.saved_tensors, ctx.senders
        flat, upstream = grad.flatten(1), gates.shape[1]
        senders.add_gradient(upstream, gates, flat)
        slope = senders.slope(upstream, flat) if ctx.needs_input_grad[0] else None
        return slope, grad.new_zeros(ctx.shape), None, None


class _Note(Function):
    """Puts a node's output into the buffer, and lets it through; its gradient is noted there on the way back.

    The token makes sure that there is a way back, whatever the output came from.
    """

    @staticmethod
    def forward(ctx: Any, change: Tensor, token: Tensor, senders: Senders, column: int) -> Tensor:
        ctx.senders, ctx.where = senders, slice(column, column + len(change))
        senders.now[ctx.where] = change
        return change.sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad = _single(grads)
        noted = ctx.senders.known_gradient()[ctx.where]
        noted.copy_(grad)
        return grad.expand_as(noted), grad.new_zeros(()), None, None


class _Tap(Function):
    """Inputs of some receivers where all gates are 1: their number and the stream [N, T, d] -> [R, N, T, d]."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, stream: Tensor, senders: Senders) -> Tensor:
        ctx.senders, ctx.upstream = senders, gates.shape[1]
        return stream.expand(len(gates), *stream.shape).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        grad = _single(grads)
        wanted = ctx.needs_input_grad[0]
        return ctx.senders.slope(ctx.upstream, grad.flatten(1)) if wanted else None, grad.sum(0), None


class _Mix(Function):
    """value [N, heads, T, dh], gate [heads], gap: value - reference -> reference + gate * gap.

    scored: the difference that the gate's gradient is taken with. keep: is given that gradient [N, heads].
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gate: Tensor, reference: Tensor, scored: Tensor, keep: Callable[[Tensor], None]
    ) -> Tensor:
        gate, ctx.keep = gate[:, None, None], keep
        ctx.save_for_backward(gate, scored)
        return torch.lerp(reference.expand_as(value), value, gate.expand_as(value))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad = _single(grads)
        gate, scored = ctx.saved_tensors
        slope = (grad * scored).sum(dim=(2, 3))
        ctx.keep(slope)
        return grad * gate, slope.sum(0), None, None, None


class SoftPass:
    """Differentiable passes over one set of prompts.

    reference: the run of ``reference_run`` for these prompts. model: may round (``precision``), as long as its
    parts can be differentiated. Raises PahqError for padding that the model would attend to, and for weights that
    come and go between the layers, which a backward pass would no longer find.
    """

    def __init__(self, model: Transformer, prompts: Prompts, graph: Graph, reference: Run) -> None:
        check_padding(prompts, model.config)
        if isinstance(model.blocks, StreamedBlocks):
            raise PahqError(
                "gradients: weights that stay in host memory cannot be differentiated through; load the model whole"
            )
        self.model, self.prompts, self.graph, self.ref = model, prompts, graph, reference
        self.rows = _rows(graph)
        self._clean: Senders | None = None

    def logits(
        self,
        gates: Tensor,
        embedding: float = 1.0,
        scored: Senders | None = None,
        held: Mapping[int, Tensor] | None = None,
        whole: bool | None = None,
    ) -> tuple[Tensor, Senders]:
        """Logits [N, P, V] at the positions read, and the senders' buffer. ``gates`` get gradients.

        gates: [n_receivers, n_senders + 1], those of direct edges in the last column (1 where there is none).
        embedding: how far the embeddings stand from the reference run (0) to these prompts (1).
        scored: see ``Senders``. held: column of a sender -> what it writes beyond the reference run [N, T, d] in
        place of what it computes; no gradient goes back through it. whole: whether all gates are 1, which is quicker;
        by default it is looked up.
        """
        model, graph, ref, prompts = self.model, self.graph, self.ref, self.prompts
        shape = torch.Size((*prompts.clean.shape, model.config.d_model))
        embed, pos = model.embed(prompts.clean)  # where the model computes, which need not be where its weights are
        senders = Senders(len(graph.senders), shape, embed, scored)
        whole = bool((gates == 1).all()) if whole is None else whole
        live = (_Whole if whole else _Live)(self, gates, senders, held or {})
        parts = [embed]
        if pos is not None:
            parts = [embed, pos[None]] if graph.split_pos else [model.add(embed, pos)]
        for column, value in enumerate(parts):
            gap = value - ref.sender(graph.senders[column])
            live.write((embedding * gap).expand(shape)[None], column)
        where = torch.arange(prompts.clean.shape[1], device=model.device)
        for layer in range(model.config.n_layers):
            live.layer(layer, where)
        (final,) = live.read([graph.receiver_index[Receiver("logits", model.config.n_layers)]], ref.final)
        example = torch.arange(len(prompts), device=model.device)[:, None]
        return model.unembed(final[example, prompts.read]), senders

    @torch.no_grad()
    def clean(self) -> Senders:
        """The senders of the clean model, made once."""
        if self._clean is None:
            ones = torch.ones(self.graph.shape, dtype=self.model.dtype, device=self.model.device)
            self._clean = self.logits(ones)[1]
        return self._clean


class _Live:
    """One pass under way."""

    def __init__(self, soft: SoftPass, gates: Tensor, senders: Senders, held: Mapping[int, Tensor]) -> None:
        self.model, self.graph, self.ref, self.rows = soft.model, soft.graph, soft.ref, soft.rows
        self.gates, self.senders, self.held = gates, senders, held
        self.token = torch.zeros((), dtype=gates.dtype, device=gates.device, requires_grad=True)

    def write(self, change: Tensor, column: int) -> None:
        """Takes in what senders from ``column`` on write beyond the reference run: [senders, N, T, d]."""
        held = [self.held.get(at) for at in range(column, column + len(change))]
        if any(one is not None for one in held):
            change = torch.stack([mine if other is None else other for mine, other in zip(change, held, strict=True)])
        self._take(change, column)

    def _take(self, change: Tensor, column: int) -> None:
        self.token = _Write.apply(change, self.token, self.senders, column)

    def read(self, rows: list[int], reference: Tensor) -> Tensor:
        """Inputs of receivers that read the same senders: [rows, N, T, d]."""
        upstream = self.graph.n_upstream(self.graph.receivers[rows[0]])
        out = self._given(self.gates[rows, :upstream], reference)
        assert isinstance(out, Tensor)
        return self.model.keep(out)  # where sums are rounded, once here and not at every sender

    def _given(self, gates: Tensor, reference: Tensor) -> Any:
        """Inputs through some gates [rows, upstream], from a reference [B, T, d]."""
        return _Read.apply(gates, self.token, self.senders, reference)

    def layer(self, layer: int, where: Tensor) -> None:
        """One layer's heads and MLP; where: the positions [T]."""
        model, graph, ref, block = self.model, self.graph, self.ref, self.model.blocks[layer]
        rows = self.rows[layer]
        together = self.read([row for some in rows.values() for row in some], ref.attn_in[layer])
        parts = together.split([len(some) for some in rows.values()])
        inputs = dict(zip(rows, parts, strict=True))
        q, k, v = (self._computed(inputs, layer, which, where) for which in "qkv")
        z = model.attend(q, k, v)
        written = block.attn.write_each(z) - block.attn.write_each(ref.z[layer])
        self.write(written, graph.sender_index[Sender("head", layer)])
        if block.mlp is not None and block.ln2 is not None:
            read = self.read([graph.receiver_index[Receiver("mlp", layer)]], ref.mlp_in[layer])[0]
            out = block.mlp(block.ln2(read)) - ref.mlp[layer]
            self.write(out[None], graph.sender_index[Sender("mlp", layer)])

    def _computed(self, inputs: dict[str, Tensor], layer: int, which: str, where: Tensor) -> Tensor:
        """q of all heads, or k or v of all groups, before the rotary turn: [N, heads, T, dh]."""
        graph, cfg, attn = self.graph, self.model.config, self.model.blocks[layer].attn
        kind = which if graph.split_qkv else "qkv"
        x = self.model.attn_input(inputs[kind], layer, which, where)
        gate = self.gates[self.rows[layer][kind], graph.direct]
        if which == "q" and kind == "qkv":  # a group's input feeds all its heads
            x, gate = (t.repeat_interleave(cfg.group_size, dim=0) for t in (x, gate))
        out = attn.project_each(x, which)
        if not graph.direct_edges:
            return out
        reference = {"q": self.ref.q, "k": self.ref.k, "v": self.ref.v}[which][layer]
        gap = self.senders.direct[which, layer] = (out - reference).detach()
        scored, key = self.senders.scored, (which, layer)
        keep = partial(self.senders.slopes.__setitem__, key)
        mixed = _Mix.apply(out, gate, reference, gap if scored is None else scored.direct[key], keep)
        assert isinstance(mixed, Tensor)
        return mixed


class _Whole(_Live):
    """One pass with all gates at 1. streams: senders so far -> the sum of what they write beyond the reference run."""

    def __init__(self, soft: SoftPass, gates: Tensor, senders: Senders, held: Mapping[int, Tensor]) -> None:
        super().__init__(soft, gates, senders, held)
        self.streams: dict[int, Tensor] = {0: senders.now.new_zeros(senders.now.shape[1:])}

    def _take(self, change: Tensor, column: int) -> None:
        noted = _Note.apply(change, self.token, self.senders, column)
        assert isinstance(noted, Tensor)
        self.streams[column + len(change)] = self.streams[column] + noted

    def _given(self, gates: Tensor, reference: Tensor) -> Any:
        return _Tap.apply(gates, self.streams[gates.shape[1]] + reference, self.senders)


def _rows(graph: Graph) -> list[dict[str, list[int]]]:
    """For each layer, the rows of its attention receivers by kind."""
    cfg = graph.config
    kinds: tuple[ReceiverKind, ...] = ("q", "k", "v") if graph.split_qkv else ("qkv",)
    counts = {kind: cfg.n_heads if kind == "q" else cfg.n_kv_heads for kind in kinds}
    return [
        {kind: [graph.receiver_index[Receiver(kind, layer, i)] for i in range(counts[kind])] for kind in kinds}
        for layer in range(cfg.n_layers)
    ]
