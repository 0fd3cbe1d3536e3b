"""The log-sum-exp over a large vocabulary from its likely tokens, with an estimate of what that misses.

Around an anchor state whose probabilities p are known in full, another state's sum is
``sum p_v exp(x_v)`` with ``x_v`` the change of a logit. Tokens that carry nearly all probability are
summed exactly; the tail T enters as ``P_T exp(mean of x over T)``, which leaves out a factor of
about exp(variance of x over T / 2): second order in a small change, but without bound in a large
one. That is estimated from the length of the change as if x were alike in all directions. It is not,
but what is truly missed is a nearly constant share of the estimate, which is learned from the states
that are summed in full as well; so the share is added, and its spread says how far the result may be
off. States closer to a decision's threshold than a multiple of that are evaluated in full: a screen
saves work but takes no decision it cannot bear.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pahq.engine.flops import CHUNK_ELEMENTS, Flops
from pahq.model.products import long, wide
from pahq.model.transformer import Transformer
from pahq.precision.formats import Format
from pahq.precision.matrix import LowMatrix, low_matrix

Product = Callable[[Tensor, LowMatrix | None, slice, Tensor | None], Tensor]

TAIL_MASS = 3e-3
"""Mean probability that may be left to the tail."""

SAFETY = 10.0
"""Slack given to a state, in multiples of the largest deviation seen from the usual share of the estimate."""

OBSERVATIONS, LEAST_DEVIATION = 6, 0.05
"""States summed both ways before the share is learned; the deviation that is allowed for in any case."""

TELLING = 2e-5
"""An estimate from here on tells something about the share; below, rounding noise drowns it."""

NOISE = 2e-6
"""Rounding noise of a metric in FP32, part of every slack."""

MIN_VOCABULARY = 8192
MAX_ELEMENTS = 1 << 26
"""A vocabulary smaller than this, or more probabilities than this to keep, makes screening pointless."""


def worth_screening(model: Transformer, positions: int) -> bool:
    """Whether a screen pays for a model and so many read positions (examples times positions)."""
    vocabulary = model.config.d_vocab_out
    return vocabulary >= MIN_VOCABULARY and positions * vocabulary <= MAX_ELEMENTS


class Screen:
    """See the module's text. Rows n run over examples and read positions: h [S, n, d], logits [n, V]."""

    def __init__(self, model: Transformer, flops: Flops, unembed: Format | None = None) -> None:
        """unembed: the unembedding's format in the products of states that form a chain."""
        self.model, self.flops, self.unembed = model, flops, unembed
        length = float(torch.linalg.vector_norm(model.W_U))
        self.spread = length**2 / model.W_U.numel()  # E |w . e|^2 for a unit vector e
        self._forget()

    def _forget(self) -> None:
        self.share, self.deviation = 0.5, 0.5
        self._seen: list[float] = []

    def select(self, logits: Tensor) -> None:
        """Chooses the tokens to be summed exactly, by their probabilities at a state. logits [n, V]"""
        mean = torch.softmax(logits, -1).mean(0)
        ordered, tokens = mean.sort(descending=True)
        count = int((ordered.double().cumsum(0) < 1 - TAIL_MASS).sum()) + 1
        self.tokens = tokens[: -(-count // 64) * 64].sort().values
        self.columns = self.model.columns(self.tokens).T  # [d, m], copied once
        self.low = None if self.unembed is None else low_matrix(self.columns, self.unembed)
        self._forget()

    def anchor(self, h: Tensor, logits: Tensor) -> Tensor:
        """Makes a state the anchor: h [n, d], logits [n, V] -> its log-sum-exp, float64 [n]."""
        largest = logits.amax(-1, keepdim=True)
        p = (logits - largest).exp_()
        mass = p.sum(-1, dtype=torch.float64)
        total = largest.squeeze(-1).double() + mass.log()
        p /= mass[:, None].to(p.dtype)
        self.h, self.total = h, total
        log_p = logits[:, self.tokens] - total[:, None].to(logits.dtype)
        self.log_bias = log_p - wide(h, self.columns)  # so that log p_v + x_v = log_bias + h' . w_v
        self.flops.add("unembed", p.numel() * h.shape[-1])
        p[:, self.tokens] = 0  # summing the tail alone: 1 - top would be rounding noise where the tail is small
        self.tail = p.sum(-1, dtype=torch.float64).clamp(min=1e-30)
        parts = [long(p[:, part], piece.T) for part, piece in self.model.unembedding()]
        self.tail_mean = sum(parts[1:], parts[0]) / self.tail[:, None].to(p.dtype)
        return total

    def logsumexp(self, h: Tensor, product: Product) -> tuple[Tensor, Tensor]:
        """h [S, n, d] -> (log-sum-exp without what the mean leaves out, estimate of that), float64 [S, n] each.

        product: the readout's, see ``vocabulary.VocabularyReadout.product``.
        """
        states, n, _ = h.shape
        self.flops.add("unembed", h.numel() * len(self.tokens))
        change = h - self.h
        top = torch.zeros(states, n, dtype=torch.float64, device=h.device)
        width = max(256, CHUNK_ELEMENTS // (states * n))
        for first in range(0, len(self.tokens), width):
            part = slice(first, first + width)
            top += product(self.columns, self.low, part, self.log_bias).exp_().sum(-1)
        tail = self.tail * (change * self.tail_mean).sum(-1).double().exp()
        # what the mean leaves out if x is normally distributed over the tail
        variance = self.spread * change.square().sum(-1).double()
        estimate = (tail * torch.expm1(0.5 * variance) / (top + tail)).clamp(max=1e6)
        return self.total + (top + tail).log(), estimate

    def observe(self, missed: float, estimate: float) -> None:
        """Learns from a state summed in full as well: what the mean left out there, and the estimate of it."""
        if estimate > TELLING:
            self._seen.append(missed / estimate)
        if len(self._seen) >= OBSERVATIONS:
            self.share = sum(self._seen) / len(self._seen)
            self.deviation = max(LEAST_DEVIATION, *(abs(share - self.share) for share in self._seen))

    def slack(self, estimate: Tensor) -> Tensor:
        """How far a metric may be off, given its error estimate."""
        return SAFETY * self.deviation * estimate + NOISE
