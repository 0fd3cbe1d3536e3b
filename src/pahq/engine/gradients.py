"""Gradients of a metric with respect to the gates of all edges, some examples at a time.

The metric is a function of all examples' logits (``match_nll`` takes an absolute value after the mean), so its
gradient is taken in two steps: with respect to the logits of all examples, then back through the model for some
examples at a time, as many as memory has room for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pahq.engine.reference import reference_run
from pahq.engine.soft import Senders, SoftPass
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.model.transformer import Transformer
from pahq.task.metrics import LogitsReadout, get_metric
from pahq.task.prompts import Prompts
from pahq.task.score import read_logits

MEMORY_LIMIT = 2 << 30
"""Bytes that the values of one piece of the examples may take."""
Point = Callable[[SoftPass, Tensor], tuple[Tensor, Senders]]
"""A differentiable pass over some examples with gates [R, S + 1] -> logits [n, P, V] and its buffer."""


class Gradients:
    """Edge gradients of one metric over one set of prompts.

    model: the model as the methods compute it (it may round). full: the full-precision model, whose ``clean`` logits
    [N, P, V] are the metric's reference.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Prompts,
        graph: Graph,
        metric: str,
        ablation: str = "resample",
        memory_limit: int = MEMORY_LIMIT,
        full: Transformer | None = None,
    ) -> None:
        self.model, self.prompts, self.graph, self.ablation = model, prompts, graph, ablation
        self._name, self.clean = metric, read_logits(model if full is None else full, prompts, "clean")
        self.metric = get_metric(metric, prompts, self.clean)
        self._shared = reference_run(model, prompts, ablation, graph.split_pos) if ablation == "mean" else None
        self._at_once = max(1, int(memory_limit / self._bytes()))
        self._cut()

    def _cut(self) -> None:
        self.pieces = [slice(first, first + self._at_once) for first in range(0, len(self.prompts), self._at_once)]
        self._pass: tuple[slice, SoftPass] | None = None

    def part(self, examples: list[int]) -> Gradients:
        """The same of some examples, the metric over these alone. Means under mean ablation remain those of all."""
        other = copy.copy(self)
        other.prompts, other.clean = self.prompts[examples], self.clean[examples]
        other.metric = get_metric(self._name, other.prompts, other.clean)
        other._cut()
        return other

    def ones(self) -> Tensor:
        """Gates of the full model, float [R, S + 1]."""
        return torch.ones(self.graph.shape, dtype=self.model.dtype, device=self.model.device)

    def gates(self, mask: np.ndarray) -> Tensor:
        """Gates of a circuit: bool [R, S + 1] -> float of the same shape; 1 where there is no edge."""
        return torch.from_numpy(mask | ~self.graph.edges).to(self.ones())

    def passes(self) -> Iterator[tuple[slice, SoftPass]]:
        """The examples piece by piece."""
        for piece in self.pieces:
            yield piece, self._soft(piece)

    def _soft(self, piece: slice) -> SoftPass:
        if self._pass is None or self._pass[0] != piece:
            self._pass = None  # makes room first
            part, ref = self.prompts[piece], self._shared
            if ref is None:
                ref = reference_run(self.model, part, self.ablation, self.graph.split_pos)
            self._pass = piece, SoftPass(self.model, part, self.graph, ref)
        return self._pass[1]

    @torch.no_grad()
    def value(self, gates: Tensor, point: Point | None = None) -> float:
        """The metric with these gates."""
        logits = self._logits(gates.detach(), plain if point is None else point)
        return self._checked(float(self.metric(LogitsReadout(logits))[0]))

    def gradient(
        self,
        gates: Tensor,
        point: Point | None = None,
        visit: Callable[[slice, SoftPass, Senders], None] | None = None,
        done: int = 0,
        partial: Tensor | None = None,
        after: Callable[[int, Tensor], None] | None = None,
    ) -> tuple[float, Tensor]:
        """The metric, and its gradient with respect to the gates, float64 [R, S + 1] (0 where there is no edge).

        point: the pass, by default a plain one. visit: called after each piece's backward pass with its examples
        and buffer, for what else is wanted of it. after: called after each piece with the number of pieces that are
        over and their gradients' sum; with these as ``done`` and ``partial`` a later call goes on to the same result.
        Raises PahqError if the metric or a gradient is not finite.
        """
        point, gates = plain if point is None else point, gates.detach()
        total = torch.zeros(self.graph.shape, dtype=torch.float64) if partial is None else partial
        total = total.to(gates.device, copy=True)
        ahead = None
        if len(self.pieces) == 1:  # one forward pass serves both steps
            ahead = self._forward(self.pieces[0], gates, point)
            logits = ahead[1].detach()
        else:
            with torch.no_grad():
                logits = self._logits(gates, point)
        value, slope = self._slope(logits)
        for index in range(done, len(self.pieces)):
            piece = self.pieces[index]
            leaf, out, senders = self._forward(piece, gates, point) if ahead is None else ahead
            out.backward(slope[piece])
            assert leaf.grad is not None
            total += leaf.grad.double()
            if visit is not None:
                visit(piece, self._soft(piece), senders)
            if after is not None:
                after(index + 1, total)
            del leaf, out, senders
        if not bool(torch.isfinite(total).all()):
            raise PahqError(
                f"metric '{self.metric.name}': its gradient holds NaN or infinity; check the model's weights, "
                "use float64, or another metric"
            )
        edges = torch.from_numpy(self.graph.edges.copy()).to(total.device)
        return value, torch.where(edges, total, 0.0)

    def _forward(self, piece: slice, gates: Tensor, point: Point) -> tuple[Tensor, Tensor, Senders]:
        """Leaf of the gates, logits and buffer of a pass over a piece that can be gone back through."""
        leaf = gates.clone().requires_grad_()
        with torch.enable_grad():
            return leaf, *point(self._soft(piece), leaf)

    def _logits(self, gates: Tensor, point: Point) -> Tensor:
        """Logits of all examples [N, P, V]."""
        return torch.cat([point(soft, gates)[0] for _, soft in self.passes()])

    def _slope(self, logits: Tensor) -> tuple[float, Tensor]:
        """The metric of logits [N, P, V], and its gradient with respect to them."""
        with torch.enable_grad():
            logits = logits.requires_grad_()
            value = self.metric(LogitsReadout(logits))[0]
            (slope,) = torch.autograd.grad(value, logits)
        return self._checked(float(value.detach())), slope

    def _checked(self, value: float) -> float:
        if not np.isfinite(value):
            raise PahqError(f"metric '{self.metric.name}' became {value}; check the model's weights, or use float64")
        return value

    def _bytes(self) -> int:
        """Memory for one example: the senders' buffers and their gradient, and what autograd keeps of every layer.

        Within a tenth of what passes through SmolLM2-135M were seen to take, the reference run included.
        """
        cfg, tokens = self.model.config, self.prompts.clean.shape[1]
        inputs = cfg.n_heads + 2 * cfg.n_kv_heads + 1  # of a layer, each also normalised, and as a gradient
        elements = (4 * len(self.graph.senders) + cfg.n_layers * (3 * inputs + 6)) * tokens * cfg.d_model
        elements += cfg.n_layers * cfg.n_heads * tokens * (4 * tokens + 8 * cfg.d_head)
        elements += cfg.n_layers * 5 * tokens * cfg.d_mlp + 3 * self.prompts.read.shape[1] * cfg.d_vocab_out
        return elements * self.model.dtype.itemsize


def plain(soft: SoftPass, gates: Tensor) -> tuple[Tensor, Senders]:
    """The pass over the prompts as they are."""
    return soft.logits(gates)


def interpolated(alpha: float) -> Point:
    """A pass from embeddings at ``alpha`` between the reference run (0) and the clean prompts (1).

    Gradients are taken with the clean run's differences, as at every point of a path from the one to the other.
    """

    def point(soft: SoftPass, gates: Tensor) -> tuple[Tensor, Senders]:
        return soft.logits(gates, alpha, scored=soft.clean() if torch.is_grad_enabled() else None)

    return point


def held(columns: Sequence[int], alpha: float) -> Point:
    """A clean pass in which some senders stand at ``alpha`` between the reference run (0) and the clean one (1).

    Their values are given, so that no gradient goes back through them; differences as for ``interpolated``.
    """

    def point(soft: SoftPass, gates: Tensor) -> tuple[Tensor, Senders]:
        clean = soft.clean()
        return soft.logits(gates, scored=clean, held={column: alpha * clean.now[column] for column in columns})

    return point


__all__ = ["MEMORY_LIMIT", "Gradients", "Point", "held", "interpolated", "plain"]
