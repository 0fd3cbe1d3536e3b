"""What one pass of the scheduler's benchmark would cost, from stated rates: the sizes, and a model of the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pahq.precision.buffers import Slot
from pahq.precision.schedule import Done
from pahq.precision.virtual import Cost

Edge = tuple[int, int]
"""Layer and head under test."""


@dataclass(frozen=True)
class Geometry:
    layers: int
    heads: int
    groups: int
    d: int
    d_mlp: int
    vocab: int
    gated: bool
    d_head: int

    def edges(self, count: int) -> list[Edge]:
        """A sample spread over all heads, in the order of a sweep: from the last layer's highest head down."""
        places = np.linspace(0, self.layers * self.heads - 1, count).round().astype(int)
        return [(int(place) // self.heads, int(place) % self.heads) for place in reversed(places)]


SIZES = {
    "gpt2": Geometry(12, 12, 12, 768, 3072, 50257, False, 64),
    "1b": Geometry(16, 32, 8, 2048, 8192, 128256, True, 64),
    "8b": Geometry(32, 32, 8, 4096, 14336, 128256, True, 128),
}
TINY = Geometry(4, 4, 2, 256, 512, 1000, True, 64)


@dataclass(frozen=True)
class Rates:
    """What the modelled device does: bytes/s, FLOP/s by format, seconds of the shortest kernel and of a launch."""

    pcie: float
    memory: float
    flops: dict[str, float]
    kernel: float
    launch: float


class ModelledNetwork:
    """The same calls, which give what they would cost."""

    def __init__(self, geo: Geometry, rates: Rates, batch: int, tokens: int, attention: str, rest: str) -> None:
        self.geo, self.rates, self.rows, self.batch = geo, rates, batch * tokens, batch
        self.tokens, self.formats = tokens, (attention, rest)

    def head_weights(self, edges: list[Edge]) -> dict[Edge, tuple[Tensor, ...]]:
        weight = torch.empty(self.geo.d, self.geo.d_head, device="meta")
        return dict.fromkeys(edges, (weight, weight, weight))

    def copier(self, source: tuple[Tensor, ...], _: object) -> Cost:
        return Cost(sum(t.nbytes for t in source) / self.rates.pcie, len(source) * self.rates.launch)

    def below(self, layer: int) -> Callable[[], Cost]:
        return lambda: self._times(layer, self._attention(), self._rest())

    def attention(self, below: Done[Cost], layer: int) -> Callable[[], Cost]:
        return self._attention

    def head(self, below: Done[Cost], slot: Slot, layer: int) -> Callable[[], Cost]:
        geo = self.geo
        products = [self._product(self.rows, geo.d, geo.d_head, "fp32")] * 3
        return lambda: self._sum(self._small(1), *products, self._patterns(1, "fp32"))

    def above(self, below: Done[Cost], low: Done[Cost], high: Done[Cost], layer: int, head: int) -> Callable[[], Cost]:
        later = self._times(self.geo.layers - layer - 1, self._attention(), self._rest())
        return lambda: self._sum(self._small(1), self._rest(), later, self._metric())

    def whole(self) -> Callable[[], Cost]:
        return lambda: self._sum(self._times(self.geo.layers, self._attention(), self._rest()), self._metric())

    def _attention(self) -> Cost:
        geo, fmt = self.geo, self.formats[0]
        wide = (geo.heads + 2 * geo.groups) * geo.d_head
        cast = 0 if fmt == "fp32" else 2
        return self._sum(
            self._small(1 + cast),
            self._product(self.rows, geo.d, wide, fmt),
            self._patterns(geo.heads, "fp32" if fmt == "fp32" else "bf16"),
        )

    def _patterns(self, heads: int, fmt: str) -> Cost:
        flops = 4 * heads * self.rows * self.tokens * self.geo.d_head
        return Cost(max(flops / self.rates.flops[fmt], self.rates.kernel), self.rates.launch)

    def _rest(self) -> Cost:
        geo, (attention, rest) = self.geo, self.formats
        into = [self._product(self.rows, geo.d, geo.d_mlp, rest)] * (2 if geo.gated else 1)
        write = self._product(self.rows, geo.heads * geo.d_head, geo.d, attention)
        return self._sum(self._small(5), write, *into, self._product(self.rows, geo.d_mlp, geo.d, rest))

    def _metric(self) -> Cost:
        return self._sum(self._small(6), self._product(self.batch, self.geo.d, self.geo.vocab, self.formats[1]))

    def _product(self, n: int, k: int, o: int, fmt: str) -> Cost:
        """A product with its roundings: casts around BF16; scales to and from FP8 are some kernels more."""
        size = {"e4m3": 1, "bf16": 2, "fp32": 4}[fmt]
        busy = max(2 * n * k * o / self.rates.flops[fmt], k * o * size / self.rates.memory, self.rates.kernel)
        around = {"e4m3": 9, "bf16": 2, "fp32": 0}[fmt]
        return self._sum(Cost(busy, self.rates.launch), self._small(around))

    def _small(self, kernels: int) -> Cost:
        """Kernels that only pass over activations [n, d]."""
        passing = 8 * self.rows * self.geo.d / self.rates.memory
        return Cost(kernels * max(passing, self.rates.kernel), kernels * self.rates.launch)

    def _sum(self, *costs: Cost) -> Cost:
        return Cost(sum(cost.device for cost in costs), sum(cost.host for cost in costs))

    def _times(self, count: int, *costs: Cost) -> Cost:
        one = self._sum(*costs)
        return Cost(count * one.device, count * one.host)
