"""Indirect object identification as a program of three heads, after the circuit of GPT-2 (Wang et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from pahq.evaluation.truth.program import Program, Target, Wire, certain, distinct, read

NAMES = 12
FIRST, SECOND, AGAIN = (1, 2), (4, 5), (7, 8, 9)
"""Positions at which the first and second name stand, and the one that comes again."""


class IndirectObject(Program):
    """Prompts like "… {A} … {B} … {B} … to" -> A, names and other words in places that vary.

    Duplicate-token head a0.1: at a name that came before, which of the two it was. S-inhibition head a2.2: takes this
    from where it stands to the last position. Name mover a4.0: goes to the other name and copies it.
    """

    name = "ioi"
    about = "indirect object: duplicate-token head, S-inhibition head and name mover in a model of six layers"
    d_vocab = 32
    length = 12
    last = 31

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        half = (n + 1) // 2
        names = distinct(half, 4, NAMES, generator)
        related = torch.rand(half, generator=generator) < 0.5
        other = torch.where(related[:, None], names[:, :2], names[:, 2:])
        pairs = torch.stack((names[:, :2], other), dim=1).view(2 * half, 2)[:n]
        flip = torch.rand(n, 1, generator=generator) < 0.5
        pairs = torch.where(flip, pairs.flip(1), pairs)
        tokens = torch.randint(NAMES, self.last, (n, self.length), generator=generator)
        tokens[:, -1] = self.last
        rows = torch.arange(n)
        spots = [_choose(places, n, generator) for places in (FIRST, SECOND, AGAIN)]
        tokens[rows, spots[0]], tokens[rows, spots[1]] = pairs[:, 0], pairs[:, 1]
        tokens[rows, spots[2]] = pairs[rows, torch.randint(2, (n,), generator=generator)]
        return tokens

    def solve(self, tokens: Tensor, wire: Wire) -> Target:
        here, there = (read(wire, "embed", f"a0.1.{which}", tokens) for which in "qk")
        like = (here[:, :, None] == there[:, None, :]) & (here < NAMES)[:, :, None]  # [n, query, key]
        like &= torch.ones_like(like[0]).tril(-1)
        early, late = (like[:, :, list(places)].any(2) for places in (FIRST, SECOND))
        order = torch.where(early & late, -1, torch.where(early, 1, torch.where(late, 2, 0)))
        order[:, : AGAIN[0]] = 0
        where, what = (read(wire, "a0.1", f"a2.2.{which}", order) for which in "kv")
        at = where.abs().argmax(1, keepdim=True)
        subject = torch.where((where != 0).sum(1) == 1, what.gather(1, at)[:, 0], 0)
        subject = read(wire, "a2.2", "a4.0.q", subject)
        keys, values = (read(wire, "embed", f"a4.0.{which}", tokens) for which in "kv")
        moved = [_name_in(keys, values, places) for places in (FIRST, SECOND)]
        answer = torch.where(subject == 1, moved[1], torch.where(subject == 2, moved[0], -1))
        return certain(wire("a4.0->logits", answer), self.d_vocab)


def _choose(places: tuple[int, ...], n: int, generator: torch.Generator) -> Tensor:
    return torch.tensor(places)[torch.randint(len(places), (n,), generator=generator)]


def _name_in(keys: Tensor, values: Tensor, places: tuple[int, ...]) -> Tensor:
    """The value [n] at the one of these places that holds a name by its key; -1 if that value is no name."""
    at = (keys[:, list(places)] < NAMES).long().argmax(1, keepdim=True)
    found = values[:, list(places)].gather(1, at)[:, 0]
    return torch.where(found < NAMES, found, -1)
