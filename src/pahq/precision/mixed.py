"""One matrix product in two precisions: some rows in FP32, the others low, at the same time where streams allow.

The paper's schedule (Wang et al. 2025, section 3): ``load`` brings the FP32 weight from host memory, ``low``
multiplies the other rows meanwhile, ``high`` the rows under test once the weight is there; then they are joined
and the FP32 rows take their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pahq.precision.buffers import Loader, assemble, pin
from pahq.precision.cpu import CpuScheduler
from pahq.precision.matrix import LowMatrix
from pahq.precision.schedule import Scheduler
from pahq.precision.store import WeightKey, WeightStore

SLOTS = 2
"""Buffers for FP32 weights: one in use, one being filled."""


class MixedProducts:
    """FP32 weights of heads under test, through a loader, and the products that need them.

    scheduler: None computes in order with the masters where they are (on the model's device).
    """

    def __init__(self, store: WeightStore, scheduler: Scheduler | None = None) -> None:
        self.store = store
        self.scheduler = CpuScheduler(torch.device("cpu"), ()) if scheduler is None else scheduler
        self._pinned: dict[WeightKey, Tensor] = {}
        self._follows: dict[WeightKey, WeightKey] = {}
        self._last: WeightKey | None = None
        self.loader: Loader[WeightKey] = Loader(self.scheduler, self._source, SLOTS)

    def _source(self, key: WeightKey) -> tuple[Tensor, ...]:
        weight = self.store.master(*key)
        if self.scheduler.device.type == "cpu":  # also without streams, when weights are where the model is
            return (weight,)
        if key not in self._pinned:
            self._pinned[key] = pin(weight.cpu(), self.scheduler.device)
        return (self._pinned[key],)

    def product(self, low: LowMatrix, key: WeightKey, x: Tensor, under: np.ndarray) -> Tensor:
        """Rows x [s, …, k] of s states -> [s, …, o]: states ``under`` (bool [s]) by the FP32 weight, the rest low."""
        slot = self.loader.fetch(key)
        rest = None
        others = list(runs(~under))
        if others:
            rest = self.scheduler.submit(
                "low",
                f"low {_name(key)}",
                lambda: _spread(low.multiply(torch.cat([x[part] for part in others])), others, len(under)),
            )
        parts = [
            (
                part,
                self.scheduler.submit(
                    "high", f"high {_name(key)}", lambda part=part: _times(x[part], slot.tensors[0]), [slot.ready]
                ),
            )
            for part in runs(under)
        ]
        slot.release(parts[-1][1])
        self._foresee(key)
        self.scheduler.join(*([] if rest is None else [rest]), *(done for _, done in parts))
        if rest is None and len(parts) == 1:
            return parts[0][1].value
        out = x.new_empty((*x.shape[:-1], low.values.shape[0])) if rest is None else rest.value
        for part, done in parts:
            assemble(out, part, done.value)
        return out

    def _foresee(self, key: WeightKey) -> None:
        """Starts the copy of the weight that came after this one last time."""
        if self._last is not None and self._last != key:
            self._follows[self._last] = key
        self._last = key
        following = self._follows.get(key)
        if following is not None:
            self.loader.prefetch(following)


def runs(under: np.ndarray) -> Iterator[slice]:
    """Consecutive stretches of True in bool [s]."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], under, [False])).astype(np.int8)))
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield slice(begin, end)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    return (x.reshape(-1, x.shape[-1]) @ weight).view(*x.shape[:-1], -1)


def _spread(rows: Tensor, parts: Sequence[slice], count: int) -> Tensor:
    """Products of some states [r, …], those of ``parts`` in order -> of all [count, …], the others' places left open.

    (By slices: an index of states would have to be sent to the device, and the host would wait for that.)
    """
    out, begin = rows.new_empty((count, *rows.shape[1:])), 0
    for part in parts:
        size = part.stop - part.start
        out[part] = rows[begin : begin + size]
        begin += size
    return out


def _name(key: WeightKey) -> str:
    name, layer, index = key
    return f"{name} {layer}.{index}" if len(name) == 1 else f"{name} {layer}"
