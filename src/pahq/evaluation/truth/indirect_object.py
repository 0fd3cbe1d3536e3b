"""Indirect object identification as a program of three heads, after the circuit of GPT-2 (Wang et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from pahq.evaluation.truth.program import Program, Target, Wire, certain, distinct, read

NAMES = 12
FIRST, SECOND = 2, 4
"""Positions of the first and the second name."""
AGAIN = (7, 8, 9)
"""Positions at which one of them may come again."""


class IndirectObject(Program):
    """Prompts like "… {A} … {B} … {B} … to" -> A, other words between them; where the name comes again varies.

    Duplicate-token head a0.1: at a name that came before, which of the two it was. S-inhibition head a2.2: takes this
    from where it stands to the last position. Name mover a4.0: goes to the other name's position and copies it.
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
        again = torch.tensor(AGAIN)[torch.randint(len(AGAIN), (n,), generator=generator)]
        tokens[:, FIRST], tokens[:, SECOND] = pairs[:, 0], pairs[:, 1]
        tokens[rows, again] = pairs[rows, torch.randint(2, (n,), generator=generator)]
        return tokens

    def solve(self, tokens: Tensor, wire: Wire) -> Target:
        here, there = (read(wire, "embed", f"a0.1.{which}", tokens) for which in "qk")
        like = (here[:, :, None] == there[:, None, :]) & (here < NAMES)[:, :, None]  # [n, query, key]
        like &= torch.ones_like(like[0]).tril(-1)
        early, late = like[:, :, FIRST], like[:, :, SECOND]
        order = torch.where(early & late, -1, torch.where(early, 1, torch.where(late, 2, 0)))
        order[:, : AGAIN[0]] = 0
        where, what = (read(wire, "a0.1", f"a2.2.{which}", order) for which in "kv")
        at = where.abs().argmax(1, keepdim=True)
        subject = torch.where((where != 0).sum(1) == 1, what.gather(1, at)[:, 0], 0)
        subject = read(wire, "a2.2", "a4.0.q", subject)
        values = read(wire, "embed", "a4.0.v", tokens)
        answer = torch.where(subject == 1, values[:, SECOND], torch.where(subject == 2, values[:, FIRST], -1))
        return certain(wire("a4.0->logits", answer), self.d_vocab)
