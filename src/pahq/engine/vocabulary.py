"""From final residual streams to what a metric asks for, without more of the vocabulary than it asks for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pahq.engine import chain
from pahq.engine.flops import CHUNK_ELEMENTS, Flops
from pahq.engine.screen import Screen
from pahq.model.products import long, wide
from pahq.model.transformer import Transformer
from pahq.precision.formats import Rounded, quantise
from pahq.precision.matrix import LowMatrix
from pahq.precision.store import WeightStore

SAFE_EXPONENT = 60.0
"""exp of a log-sum-exp up to here, either way, stays well inside float32's range."""
Products = tuple[tuple[Tensor, Tensor], ...]
"""(columns [d, m], logits [N * P, m] of a state with them)"""
SLAB = 1 << 13
"""Columns of the unembedding that are copied to a metric's wider type at a time."""
FAR_ELEMENTS = 1 << 24
"""Logits held at a time for states beyond that."""


class Vocabulary:
    """The unembedding of one model for N examples at P read positions.

    typical: log-sum-exp [N, P] of the clean model, the scale of every state's.
    weight: [N, P], how much each position counts in the metric.
    screen: sums over likely tokens where that will do; None for full sums always. rounds: logits are rounded.
    """

    def __init__(
        self,
        model: Transformer,
        typical: Tensor,
        weight: Tensor,
        flops: Flops,
        screen: Screen | None,
        rounds: bool = False,
    ) -> None:
        self.model, self.weight, self.flops, self.screen, self.rounds = model, weight, flops, screen, rounds
        self.shift = None if float(typical.abs().max()) < SAFE_EXPONENT else typical
        self._directions: list[tuple[Tensor, Tensor, Tensor]] = []

    def read_base(self, base: ChainBase, full: bool = False) -> VocabularyReadout:
        """The base state of a chain, as one state."""
        return VocabularyReadout(self, base.h[None], None if full else self.screen, base=base)

    def read(self, x: Tensor, full: bool = False, chained: Chained | None = None) -> VocabularyReadout:
        """x [S, N, P, d], final residual streams at the read positions. full: do not screen."""
        return VocabularyReadout(self, self.model.unembed_input(x), None if full else self.screen, chained)

    def mean(self, value: Tensor) -> Tensor:
        """value [..., N, P] -> its mean over the positions that count [...]"""
        return (value * self.weight).sum(dim=(-1, -2))

    def direction(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [N, P, V] -> (sum of unembedding columns [N, P, d], sum of biases [N, P]), kept for the next call."""
        for key, direction, bias in self._directions:
            if key is probabilities:
                return direction, bias
        dtype, b_U = probabilities.dtype, self.model.b_U
        direction = probabilities.new_zeros((*probabilities.shape[:-1], self.model.W_U.shape[0]))
        for whole, piece in self.model.unembedding():
            slabs = piece.split(SLAB, dim=1)  # a few at a time, since they are copied to a wider type
            for first, columns in zip(range(whole.start, whole.stop, SLAB), slabs, strict=True):
                direction += long(probabilities[..., first : first + columns.shape[1]], columns.to(dtype).T)
        bias = torch.zeros_like(probabilities[..., 0]) if b_U is None else probabilities @ b_U.to(dtype)
        self._directions.append((probabilities, direction, bias))
        return direction, bias

    def anchor(self, h: Tensor, select: bool) -> Tensor:
        """Anchors the screen at one state: normalised h [N, P, d] -> its log-sum-exp, float64 [N, P].

        select: choose the tokens afresh.
        """
        assert self.screen is not None
        rows = h.reshape(-1, h.shape[-1])
        self.flops.add("unembed", rows.numel() * self.model.W_U.shape[1])
        logits = self.model.times_unembedding(rows)
        logits = logits if self.model.b_U is None else logits + self.model.b_U
        if select:
            self.screen.select(logits)
        return self.screen.anchor(rows, logits).view(h.shape[:-1])


class ChainBase:
    """The base state that a chain starts from. final: its residual stream at the read positions [N, P, d].

    carried: logits that the chain of an earlier batch arrived at, see ``VocabularyReadout.carried``.
    """

    def __init__(self, final: Tensor, model: Transformer, carried: Products = ()) -> None:
        self.final, self.model = final, model
        self.h = model.unembed_input(final)
        self._kept = list(carried)
        self._latest: Products = ()

    def logits(self, columns: Tensor, part: slice, offset: Tensor | None, passing: bool = False) -> Tensor:
        """h [N * P, d] times part of the columns [d, m], plus part of the offset. Not to be changed in place.

        passing: the columns are on the device for a moment; their product is kept until that of others is made.
        """
        out = next((product for known, product in (*self._kept, *self._latest) if known is columns), None)
        if out is None:
            rows = self.h.reshape(-1, self.h.shape[-1])
            if rows.shape[0] * columns.shape[1] > FAR_ELEMENTS:
                out = wide(rows, columns[:, part])
                return out if offset is None else out.add_(offset[:, part])
            out = wide(rows, columns)
            if passing:
                self._latest = ((columns, out),)
            else:
                self._kept.append((columns, out))
        return out[:, part] if offset is None else out[:, part] + offset[:, part]


@dataclass(frozen=True)
class Chained:
    """The states of a readout as a chain (see ``engine.chains``).

    base: where it starts; spine: bool [S]; store: has the unembedding; likely: the state that may be the next base.
    """

    base: ChainBase
    spine: list[bool]
    store: WeightStore
    likely: int | None = None


class VocabularyReadout:
    """Answers of some states; h [S, N, P, d] is the normalised final residual stream. See ``task.metrics.Readout``.

    slack: float64 [S], how far a metric built on these answers may be from the full sum's.
    chained: sums over the vocabulary multiply differences of states in low precision.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        h: Tensor,
        screen: Screen | None,
        chained: Chained | None = None,
        base: ChainBase | None = None,
    ) -> None:
        self.vocabulary, self.h, self.screen, self.chained, self.base = vocabulary, h, screen, chained, base
        self.slack = np.zeros(h.shape[0])
        self.missed: tuple[Tensor, Tensor] | None = None  # of a screened sum: (without, estimate) [S, N, P] each
        self._logsumexp: Tensor | None = None
        self._change: Rounded | None = None
        self._carried: list[tuple[Tensor, Tensor]] = []
        self.moved = np.zeros(h.shape[0])
        """Length of the change from a state's parent: root of its mean square over positions read, float64 [S]."""
        if chained is not None:
            change = chain.deltas(h, chained.base.h, chained.spine)
            self.moved = vocabulary.mean(change.square().sum(-1).double()).sqrt().cpu().numpy()
            self._change = quantise(change.flatten(0, -2), chained.store.policy.format("unembed"), spent=True)

    def product(
        self, columns: Tensor, low: LowMatrix | None, part: slice, offset: Tensor | None, passing: bool = False
    ) -> Tensor:
        """Some logits of all states: [S, n, width], n running over examples and read positions.

        columns [d, m], and the same in low precision for chained states; part of the m; offset [n or 1, m] is added.
        passing: see ``ChainBase.logits``.
        """
        states, width = self.h.shape[0], self.h.shape[-1]
        if self.base is not None:
            return self.base.logits(columns, part, offset, passing)[None].clone()
        if self.chained is None or self._change is None or low is None:
            out = wide(self.h.reshape(-1, width), columns[:, part]).view(states, -1, columns[:, part].shape[1])
            return out if offset is None else out.add_(offset[:, part])
        tip = self.chained.base.logits(columns, part, None, passing)
        out = chain.sums(low.part(part).product(self._change).view(states, *tip.shape), tip, self.chained.spine)
        if self.chained.likely is not None and not passing:
            self._carried.append((columns, out[self.chained.likely].clone()))
        return out if offset is None else out.add_(offset[:, part])

    def carried(self, columns: Tensor) -> Products:
        """Logits [N * P, m] of the likely next base with the columns [d, m], as its chain ends: the next one's start.

        (Its own product would differ by the chain's rounding, and so shift all effects of the next batch.)
        """
        pieces = [piece for known, piece in self._carried if known is columns]
        if sum(piece.shape[1] for piece in pieces) != columns.shape[1]:
            return ()
        return ((columns, torch.cat(pieces, dim=-1)),)

    def select(self, ids: Tensor) -> Tensor:
        model, ids = self.vocabulary.model, ids.clamp(min=0)
        columns = model.columns(ids)  # [N, P, A, d]
        out = torch.einsum("snpd,npad->snpa", self.h, columns)
        return model.logits(out if model.b_U is None else out + model.b_U[ids])

    def expect(self, probabilities: Tensor) -> Tensor:
        if self.vocabulary.rounds:  # then a sum of logits is no product with a sum of columns
            return torch.stack([(row.to(probabilities.dtype) * probabilities).sum(-1) for row in self.logits()])
        direction, bias = self.vocabulary.direction(probabilities)
        return (self.h.to(direction.dtype) * direction).sum(-1) + bias

    def logits(self) -> Tensor:
        model = self.vocabulary.model
        self._count()
        parts = [self._piece(part, piece, slice(None)) for part, piece in model.unembedding()]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return model.logits(out).view(*self.h.shape[:-1], -1)

    def _piece(self, whole: slice, piece: Tensor, part: slice) -> Tensor:
        """Part of the columns ``whole`` of W_U, which ``piece`` [d, some] holds -> logits [S, n, width]."""
        model, low = self.vocabulary.model, self._low
        offset = None if model.b_U is None else model.b_U[None, whole]
        return self.product(piece, None if low is None else low.part(whole), part, offset, piece is not model.W_U)

    @property
    def _low(self) -> LowMatrix | None:
        return None if self.chained is None else self.chained.store.matrix("unembed")

    def know_logsumexp(self, value: Tensor) -> None:
        """Takes the log-sum-exp [S, N, P] from elsewhere."""
        self._logsumexp = value

    def logsumexp(self) -> Tensor:
        if self._logsumexp is None:
            self._logsumexp = self._full() if self.screen is None else self._screened(self.screen)
        return self._logsumexp

    def _screened(self, screen: Screen) -> Tensor:
        value, estimate = screen.logsumexp(self.h.flatten(1, 2), self.product)
        far = ~((value - screen.total).abs() <= SAFE_EXPONENT).all(-1)  # exp may have left its range (or a NaN)
        if bool(far.any()):
            value[far] = VocabularyReadout(self.vocabulary, self.h[far], None).logsumexp().flatten(1)
            estimate[far] = 0.0
        value, estimate = (t.view(self.h.shape[:-1]) for t in (value, estimate))
        self.missed = value, estimate
        self.slack = screen.slack(self.vocabulary.mean(estimate)).cpu().numpy()
        return value + screen.share * estimate

    def _full(self) -> Tensor:
        """The product with W_U a slab of columns at a time, so that no logit travels to memory and back."""
        vocabulary, model = self.vocabulary, self.vocabulary.model
        self._count()
        rows = self.h.reshape(-1, self.h.shape[-1])
        total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
        shift = None
        if vocabulary.shift is not None:
            shift = vocabulary.shift.to(rows.dtype).expand(self.h.shape[:-1]).reshape(-1, 1)
        width = max(256, CHUNK_ELEMENTS // max(1, rows.shape[0]))
        for whole, piece in model.unembedding():
            for first in range(0, piece.shape[1], width):
                slab = model.logits(self._piece(whole, piece, slice(first, first + width)).flatten(0, 1))
                if shift is not None:
                    slab -= shift
                total += slab.exp_().sum(-1)
        out = total.log()
        far = ~(out.abs() <= SAFE_EXPONENT)  # so far from the clean state that exp loses digits (or a NaN, which stays)
        if shift is not None:
            out += shift.squeeze(-1)
        for some in far.nonzero().squeeze(-1).split(max(1, FAR_ELEMENTS // model.W_U.shape[1])):
            logits = model.times_unembedding(rows[some])
            out[some] = torch.logsumexp(model.logits(logits if model.b_U is None else logits + model.b_U), -1).double()
        return out.view(self.h.shape[:-1])

    def _count(self) -> None:
        self.vocabulary.flops.add("unembed", self.h.numel() * self.vocabulary.model.W_U.shape[1])
