"""Prompts for the compiled programs: lists of tokens behind the first token that the compiler asks for."""

from __future__ import annotations

import random
from abc import abstractmethod
from itertools import product

import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.evaluation.truth.base import check_reader
from pahq.model.transformer import Transformer
from pahq.task.base import Task, check_request, share
from pahq.task.prompts import Prompts


class _Lists(Task):
    """All lists of ``length`` of the tokens ``values`` (ids), ``first`` before them, read at every later position.

    The lists, shuffled by the seed, are dealt to the splits in turn; a corrupt prompt is another list of the split.
    """

    first: int
    values: tuple[int, ...]
    length: int

    def prompts(self, model: Transformer, n: int, seed: int = 0, split: str = "validation") -> Prompts:
        check_request(self.name, n, split)
        check_reader(self.name, model)
        rng = random.Random(f"{self.name} {seed}")
        every = list(product(self.values, repeat=self.length))
        rng.shuffle(every)
        chosen = [row for position, row in enumerate(every) if share(position, split)]
        if len(chosen) < n:
            raise PahqError(
                f"task '{self.name}': {n} examples asked for, but split '{split}' has {len(chosen)}; ask for fewer"
            )
        # The list after it, cyclically over the whole split: a longer draw begins with the examples of a shorter one.
        pairs = list(zip(chosen, [*chosen[1:], chosen[0]], strict=True))[:n]
        clean, corrupt = (torch.tensor([[self.first, *pair[side]] for pair in pairs]) for side in (0, 1))
        read = torch.arange(1, self.length + 1).expand(n, -1).clone()
        right, wrong = self.answers(clean[:, 1:])
        return Prompts(clean, corrupt, read, torch.ones_like(read, dtype=torch.bool), right, wrong).to(model.device)

    @abstractmethod
    def answers(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Lists [N, length] -> right and wrong outputs at each position [N, length, A], -1 where there are none."""


class Reverse(_Lists):
    """The list read backwards; the output at a position names one of the three tokens."""

    name = "tracr-reverse"
    description = "three tokens, to be given back in reverse order"
    default_metric = "l2"
    metrics = ("l2", "logit_diff", "nll", "match_nll")
    first, values, length = 3, (0, 1, 2), 3

    def answers(self, values: Tensor) -> tuple[Tensor, Tensor]:
        right = values.flip(1)[..., None]
        return right, (right + torch.tensor([1, 2])) % len(self.values)


class Proportion(_Lists):
    """The share of the token x among those so far: a number, so that there is no right answer among tokens."""

    name = "tracr-proportion"
    description = "four tokens; at each, the share of x among those so far"
    default_metric = "l2"
    metrics = ("l2",)
    first, values, length = 0, (2, 3, 4, 5), 4

    def answers(self, values: Tensor) -> tuple[Tensor, Tensor]:
        nothing = torch.full((*values.shape, 1), -1)
        return nothing, nothing
