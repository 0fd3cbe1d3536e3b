"""The positions at which anything has to be computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pahq.engine.marks import Reach
from pahq.model.config import ModelConfig
from pahq.task.prompts import Prompts


@dataclass(frozen=True)
class Spans:
    """``start:stop`` is the range outside which no state can differ from the clean run, or where nothing is read.

    read: int64 [B, P], positions the metric looks at. dense: they are so many that the whole
    range is used in their place (then ``READ`` values are laid out like ``ALL`` values).
    """

    start: int
    stop: int
    read: Tensor
    dense: bool

    @classmethod
    def of(cls, prompts: Prompts, config: ModelConfig, ablation: str, split_pos: bool = False) -> Spans:
        """Under resampling and causal attention nothing differs before the first differing token.

        A split position embedding is permuted in the corrupted run, and so differs everywhere.
        """
        length = prompts.clean.shape[1]
        start, stop = 0, length
        if config.causal:
            stop = int(prompts.read.max()) + 1
            differs = (prompts.clean != prompts.corrupt).any(dim=0)[:stop].nonzero()
            if ablation == "resample" and len(differs) and not split_pos:
                start = min(int(differs[0, 0]), int(prompts.read.min()))
        return cls(start, stop, prompts.read, dense=2 * prompts.read.shape[1] > stop - start)

    def count(self, level: Reach) -> int:
        """Positions computed for a value of that reach."""
        return self.stop - self.start if level == Reach.ALL or self.dense else self.read.shape[1]

    def positions(self, level: Reach) -> Tensor:
        """Their indices: int64 [P'] for the whole range, [B, P] for the positions read."""
        if level == Reach.ALL or self.dense:
            return torch.arange(self.start, self.stop, device=self.read.device)
        return self.read

    def take(self, value: Tensor, level: Reach) -> Tensor:
        """value [B, T, c] over all T tokens -> [B, P', c] at the positions of ``level``."""
        if level == Reach.ALL or self.dense:
            return value[:, self.start : self.stop]
        return gather(value, self.read)

    def narrow(self, value: Tensor, level: Reach, to: Reach) -> Tensor:
        """value [..., B, P', c] laid out for ``level`` -> laid out for ``to`` (the same or a narrower reach)."""
        if self.dense or level == to:
            return value
        return gather(value, self.read - self.start)

    def at_read(self, value: Tensor) -> Tensor:
        """value [..., B, P', c] laid out for ``READ`` -> [..., B, P, c] at the metric's positions."""
        return gather(value, self.read - self.start) if self.dense else value


def gather(value: Tensor, index: Tensor) -> Tensor:
    """value [..., B or 1, T, c], index [B, P] -> [..., B, P, c]"""
    batch = torch.arange(index.shape[0], device=index.device)[:, None]
    if value.shape[-3] == 1:
        batch = torch.zeros_like(batch)
    return value[..., batch, index, :]
