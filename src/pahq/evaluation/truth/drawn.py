"""The task of a program: pairs of random prompts as token ids, no tokenizer needed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.evaluation.truth.base import check_reader
from pahq.evaluation.truth.program import Program, untouched
from pahq.model.transformer import Transformer
from pahq.task.base import PATIENCE, Task, check_request, share
from pahq.task.prompts import Prompts, last_position

BLOCK = 256
"""Prompts drawn at a time: fixed, so that a longer draw begins like a shorter one."""


Pair = tuple[tuple[int, ...], int]
"""A prompt's tokens and its answer."""


class DrawnTask(Task):
    """Pairs of prompts of one program whose answers differ, read at the last position.

    The corrupt prompt is another prompt of the same program; its answer is the wrong one. No prompt, clean or
    corrupt, stands in two splits, or twice in one.
    """

    default_metric = "kl_div"

    def __init__(self, program: Program) -> None:
        self.program, self.name, self.description = program, f"trained-{program.name}", program.about

    def prompts(self, model: Transformer, n: int, seed: int = 0, split: str = "validation") -> Prompts:
        check_request(self.name, n, split)
        check_reader(self.name, model)
        known, longest = model.config.d_vocab, model.config.n_ctx
        if known < self.program.d_vocab or longest < self.program.length:
            raise PahqError(
                f"task '{self.name}': {model.config.name} knows {known} tokens in {longest} positions, but the prompts "
                f"have {self.program.d_vocab} in {self.program.length}; take the model trained for them"
            )
        chosen: list[tuple[Pair, Pair]] = []
        for position, pair in enumerate(self._pairs(seed)):
            if len(chosen) == n:
                break
            if share(position, split):
                chosen.append(pair)
        if len(chosen) < n:
            raise PahqError(
                f"task '{self.name}': {n} examples asked for, but split '{split}' has {len(chosen)}; ask for fewer"
            )
        sides = [torch.tensor([pair[side][0] for pair in chosen]) for side in (0, 1)]
        answers = [[[pair[side][1]] for pair in chosen] for side in (0, 1)]
        return last_position(sides[0], sides[1], answers[0], answers[1]).to(model.device)

    def _pairs(self, seed: int) -> Iterator[tuple[Pair, Pair]]:
        """Pairs of (tokens, answer) with different answers, no prompt in two of them, until there are no new ones."""
        # A text as seed is hashed by the random module itself, the same in every process.
        generator = torch.Generator().manual_seed(random.Random(f"{self.name} {seed}").getrandbits(62))
        seen: set[tuple[int, ...]] = set()
        idle = 0
        while idle < PATIENCE:
            tokens = self.program.draw(BLOCK, generator)
            drawn = [tuple(row) for row in tokens.tolist()]
            answers = self._answers(tokens)
            for at in range(0, BLOCK, 2):
                idle += 1
                pair = ((drawn[at], answers[at]), (drawn[at + 1], answers[at + 1]))
                if answers[at] != answers[at + 1] and not seen.intersection(drawn[at : at + 2]):
                    seen.update(drawn[at : at + 2])
                    idle = 0
                    yield pair

    def _answers(self, tokens: Tensor) -> list[int]:
        return self.program.solve(tokens, untouched).probabilities.argmax(1).tolist()
