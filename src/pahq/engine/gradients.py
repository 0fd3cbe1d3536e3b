"""Gradients of a metric with respect to the gates of all edges, some examples at a time.

The metric is a function of all examples' logits (``match_nll`` takes an absolute value after the mean), so its
gradient is taken in two steps: with respect to the logits of all examples, then back through the model for some
examples at a time, as many as memory has room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from pahq.engine.reference import Run, reference_run
from pahq.engine.soft import Senders, SoftPass
from pahq.errors import PahqError
from pahq.evaluation.behaviour import LogitsReadout
from pahq.graph import Graph
from pahq.model.transformer import Transformer
from pahq.task.metrics import get_metric
from pahq.task.prompts import Prompts
from pahq.task.score import read_logits

MEMORY_LIMIT = 2 << 30
"""Bytes that the values of one piece of the examples may take."""
Point = Callable[[SoftPass, Tensor], tuple[Tensor, Senders]]
"""A differentiable pass over some examples with gates [R, S + 1] -> logits [n, P, V] and its buffer."""


class Gradients:
    """Edge gradients of one metric over one set of prompts.

    model: the model as the methods compute it (it may round); metric's reference: the logits of ``full``, the
    full-precision clean model.
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
        self.metric = get_metric(metric, prompts, read_logits(model if full is None else full, prompts, "clean"))
        self._shared = reference_run(model, prompts, ablation, graph.split_pos) if ablation == "mean" else None
        step = max(1, int(memory_limit / self._bytes()))
        self.pieces = [slice(first, first + step) for first in range(0, len(prompts), step)]
        self._pass: tuple[slice, SoftPass] | None = None

    def ones(self) -> Tensor:
        """Gates of the full model, float [R, S + 1]."""
        return torch.ones(self.graph.shape, dtype=self.model.dtype, device=self.model.device)

    def gates(self, mask: np.ndarray) -> Tensor:
        """Gates of a circuit: bool [R, S + 1] -> float of the same shape; 1 where there is no edge."""
        return torch.from_numpy(mask | ~self.graph.edges).to(self.ones())

    def passes(self) -> Iterator[tuple[slice, SoftPass]]:
        """The examples piece by piece."""
        for piece in self.pieces:
            if self._pass is None or self._pass[0] != piece:
                part = self.prompts[piece]
                ref = self._shared
                if ref is None:
                    ref = reference_run(self.model, part, self.ablation, self.graph.split_pos)
                self._pass = piece, SoftPass(self.model, part, self.graph, ref)
            yield self._pass

    @torch.no_grad()
    def value(self, gates: Tensor, point: Point | None = None) -> float:
        """The metric with these gates."""
        point = plain if point is None else point
        logits = torch.cat([point(soft, gates)[0] for _, soft in self.passes()])
        return self._checked(float(self.metric(LogitsReadout(logits))[0]))

    def gradient(
        self, gates: Tensor, point: Point | None = None, visit: Callable[[slice, SoftPass, Senders], None] | None = None
    ) -> tuple[float, Tensor]:
        """The metric, and its gradient with respect to the gates, float64 [R, S + 1] (0 where there is no edge).

        point: the pass, by default a plain one. visit: called after each piece's backward pass with its examples
        and buffer, for what else is wanted of it. Raises PahqError if the metric or a gradient is not finite.
        """
        point = plain if point is None else point
        gates = gates.detach()
        alone = len(self.pieces) == 1  # then one forward pass serves both steps
        held, found = None, []
        for _, soft in self.passes():
            leaf = gates.clone().requires_grad_(alone)
            with torch.set_grad_enabled(alone):
                held = leaf, *point(soft, leaf)
            found.append(held[1].detach())
        logits = torch.cat(found).requires_grad_()
        value = self.metric(LogitsReadout(logits))[0]
        (slope,) = torch.autograd.grad(value, logits)
        total = torch.zeros(self.graph.shape, dtype=torch.float64, device=gates.device)
        for piece, soft in self.passes():
            if not alone or held is None:
                leaf = gates.clone().requires_grad_()
                held = leaf, *point(soft, leaf)
            leaf, out, senders = held
            out.backward(slope[piece])
            assert leaf.grad is not None
            total += leaf.grad.double()
            if visit is not None:
                visit(piece, soft, senders)
            held = None
        if not bool(torch.isfinite(total).all()):
            raise PahqError(
                f"metric '{self.metric.name}': its gradient holds NaN or infinity; check the model's weights, "
                "use float64, or another metric"
            )
        edges = torch.from_numpy(self.graph.edges.copy()).to(total.device)
        return self._checked(float(value.detach())), torch.where(edges, total, 0.0)

    def _checked(self, value: float) -> float:
        if not np.isfinite(value):
            raise PahqError(
                f"metric '{self.metric.name}' became {value}; check the model's weights, or use float64"
            )
        return value

    def _bytes(self) -> int:
        """Memory for one example: the senders' buffer and its gradient, and what autograd keeps of every layer."""
        cfg, tokens = self.model.config, self.prompts.clean.shape[1]
        receivers = cfg.n_layers * (3 * (cfg.n_heads + 2 * cfg.n_kv_heads) + 3)  # input, normalised, and their gradients
        elements = (3 * len(self.graph.senders) + receivers) * tokens * cfg.d_model
        elements += cfg.n_layers * cfg.n_heads * tokens * (4 * tokens + 8 * cfg.d_head)
        elements += cfg.n_layers * 5 * tokens * cfg.d_mlp + 3 * self.prompts.read.shape[1] * cfg.d_vocab_out
        return elements * self.model.dtype.itemsize


def plain(soft: SoftPass, gates: Tensor) -> tuple[Tensor, Senders]:
    """The pass over the prompts as they are."""
    return soft.logits(gates)


def interpolated(alpha: float, scored: Callable[[SoftPass], Tensor] | None = None) -> Point:
    """A pass with embeddings at ``alpha`` between the reference run (0) and the clean prompts (1).

    scored: gives the senders' differences [senders, N, T, d] that gradients are multiplied with.
    """

    def point(soft: SoftPass, gates: Tensor) -> tuple[Tensor, Senders]:
        return soft.logits(gates, alpha, None if scored is None else scored(soft))

    return point


@torch.no_grad()
def clean_differences(soft: SoftPass) -> Tensor:
    """Senders of the clean run less those of the reference run, as written: [senders, N, T, d]."""
    ones = torch.ones(soft.graph.shape, dtype=soft.model.dtype, device=soft.model.device)
    return soft.logits(ones)[1].now


__all__ = ["Gradients", "Point", "Run", "clean_differences", "interpolated", "plain"]
