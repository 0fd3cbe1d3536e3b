"""Tokenised prompt pairs: what every engine and metric works on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.model.config import ModelConfig


@dataclass(frozen=True)
class Prompts:
    """N prompt pairs of T tokens, and where and what the metric reads.

    clean, corrupt: int64 [N, T], right-padded (padding is never read).
    read: int64 [N, P], the positions whose logits the metric looks at (P = 1 for most tasks).
    read_mask: bool [N, P], False where an example has fewer than P of them.
    answers, wrong: int64 [N, P, A], right answers and wrong ones for each position read, padded with -1.
    pad: bool [N, T], True on padding tokens, or None where all prompts have the same length.
    """

    clean: Tensor
    corrupt: Tensor
    read: Tensor
    read_mask: Tensor
    answers: Tensor
    wrong: Tensor
    pad: Tensor | None = None
    texts: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.clean.shape != self.corrupt.shape:
            raise PahqError(
                f"prompts: clean {list(self.clean.shape)} and corrupt {list(self.corrupt.shape)} differ in shape; "
                "make them the same number of tokens"
            )
        if not len(self):
            raise PahqError("prompts: there are none; give at least one pair")

    def __len__(self) -> int:
        return self.clean.shape[0]

    def __getitem__(self, index: slice | list[int] | Tensor) -> Prompts:
        """A subset of the examples."""
        which = torch.arange(len(self))[index].tolist()
        pick = {
            name: getattr(self, name)[which]
            for name in ("clean", "corrupt", "read", "read_mask", "answers", "wrong", "pad")
            if getattr(self, name) is not None
        }
        return replace(self, **pick, texts=tuple(self.texts[i] for i in which) if self.texts else ())

    def to(self, device: torch.device | str) -> Prompts:
        names = ("clean", "corrupt", "read", "read_mask", "answers", "wrong", "pad")
        return replace(self, **{n: getattr(self, n).to(device) for n in names if getattr(self, n) is not None})


def check_padding(prompts: Prompts, config: ModelConfig) -> None:
    """Raises PahqError where a model would attend to padding: a bidirectional one sees what lies to the right."""
    if prompts.pad is not None and not config.causal and bool(prompts.pad.any()):
        raise PahqError("prompts: padding needs causal attention; give a bidirectional model prompts of one length")


def last_position(
    clean: Tensor, corrupt: Tensor, answers: list[list[int]], wrong: list[list[int]], texts: tuple = ()
) -> Prompts:
    """Prompts of equal length read at the last position. ``answers`` and ``wrong`` are token ids by example."""
    n, length = clean.shape
    return Prompts(
        clean=clean,
        corrupt=corrupt,
        read=torch.full((n, 1), length - 1),
        read_mask=torch.ones(n, 1, dtype=torch.bool),
        answers=pad_ids(answers)[:, None, :],
        wrong=pad_ids(wrong)[:, None, :],
        texts=texts,
    )


def pad_ids(ids: list[list[int]]) -> Tensor:
    """Lists of token ids -> int64 [N, longest (at least 1)], padded with -1."""
    width = max([1, *map(len, ids)])
    return torch.tensor([row + [-1] * (width - len(row)) for row in ids], dtype=torch.int64)
