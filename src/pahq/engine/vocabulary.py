"""From final residual streams to what a metric asks for, without more of the vocabulary than it asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from pahq.engine.flops import Flops
from pahq.model.transformer import Transformer

CHUNK_ELEMENTS = 1 << 20
"""Logits held at a time: small enough that exp and sum find them in the cache."""


class Vocabulary:
    """The unembedding of one model for N examples at P read positions.

    shift: [N, P], a number close to the log-sum-exp of every state, which keeps exp in range.
    """

    def __init__(self, model: Transformer, shift: Tensor, flops: Flops) -> None:
        self.model, self.shift, self.flops = model, shift, flops
        self._directions: list[tuple[Tensor, Tensor, Tensor]] = []

    def read(self, x: Tensor) -> VocabularyReadout:
        """x [S, N, P, d], final residual streams at the read positions."""
        return VocabularyReadout(self, self.model.ln_final(x))

    def direction(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [N, P, V] -> (sum of unembedding columns [N, P, d], sum of biases [N, P]), kept for the next call."""
        for key, direction, bias in self._directions:
            if key is probabilities:
                return direction, bias
        direction = torch.einsum("npv,dv->npd", probabilities, self.model.W_U.to(probabilities.dtype))
        b_U = self.model.b_U
        bias = torch.zeros_like(probabilities[..., 0]) if b_U is None else probabilities @ b_U.to(probabilities.dtype)
        self._directions.append((probabilities, direction, bias))
        return direction, bias


class VocabularyReadout:
    """Answers of some states; h [S, N, P, d] is the normalised final residual stream. See ``task.metrics.Readout``."""

    def __init__(self, vocabulary: Vocabulary, h: Tensor) -> None:
        self.vocabulary, self.h = vocabulary, h
        self._logsumexp: Tensor | None = None

    def select(self, ids: Tensor) -> Tensor:
        model, ids = self.vocabulary.model, ids.clamp(min=0)
        columns = model.W_U.T[ids]  # [N, P, A, d]
        out = torch.einsum("snpd,npad->snpa", self.h, columns)
        return out if model.b_U is None else out + model.b_U[ids]

    def expect(self, probabilities: Tensor) -> Tensor:
        direction, bias = self.vocabulary.direction(probabilities)
        return (self.h.to(direction.dtype) * direction).sum(-1) + bias

    def logits(self) -> Tensor:
        model = self.vocabulary.model
        self._count()
        out = self.h @ model.W_U
        return out if model.b_U is None else out + model.b_U

    def logsumexp(self) -> Tensor:
        if self._logsumexp is None:
            self._logsumexp = self._sum_in_chunks()
        return self._logsumexp

    def _sum_in_chunks(self) -> Tensor:
        """The product with W_U a slab of columns at a time, so that no logit travels to memory and back."""
        model = self.vocabulary.model
        self._count()
        rows = self.h.reshape(-1, self.h.shape[-1])
        shift = self.vocabulary.shift.to(rows.dtype).expand(self.h.shape[:-1]).reshape(-1, 1)
        total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
        width = max(256, CHUNK_ELEMENTS // max(1, rows.shape[0]))
        for first in range(0, model.W_U.shape[1], width):
            slab = rows @ model.W_U[:, first : first + width]
            if model.b_U is not None:
                slab += model.b_U[first : first + width]
            total += slab.sub_(shift).exp_().sum(-1)
        out = total.log() + shift.squeeze(-1)
        bad = ~torch.isfinite(out)
        if bool(bad.any()):  # a state so far from the clean one that exp left its range (or a NaN, which stays one)
            logits = rows[bad] @ model.W_U
            out[bad] = torch.logsumexp(logits if model.b_U is None else logits + model.b_U, -1).double()
        return out.view(self.h.shape[:-1])

    def _count(self) -> None:
        self.vocabulary.flops.add("unembed", self.h.numel() * self.vocabulary.model.W_U.shape[1])
