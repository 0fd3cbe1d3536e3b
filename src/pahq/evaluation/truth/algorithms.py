"""Small algorithms placed in heads and MLPs: sum, majority, induction (twice), maximum."""

from __future__ import annotations

import torch
from torch import Tensor

from pahq.evaluation.truth.program import Program, Target, Wire, certain, distinct, read


class Sum(Program):
    """Tokens are digits, the last one "=". Two heads fetch one digit each; an MLP adds them modulo ten."""

    name = "sum"
    about = "sum of two digits modulo ten: heads fetch the digits, an MLP adds them"
    d_vocab = 11
    length = 6

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        tokens = torch.randint(10, (n, self.length), generator=generator)
        tokens[:, -1] = 10
        return tokens

    def solve(self, tokens: Tensor, wire: Wire) -> Target:
        first = wire("a0.1->m1", read(wire, "embed", "a0.1.v", tokens)[:, 1])
        second = wire("a0.2->m1", read(wire, "embed", "a0.2.v", tokens)[:, 3])
        return certain(wire("m1->logits", (first + second) % 10), self.d_vocab)


class Majority(Program):
    """Tokens are letters, the last one "?". One head counts letter 0, one letter 1, and an MLP says which is more."""

    name = "majority"
    about = "which of two letters comes more often: heads of two layers count, an MLP compares"
    d_vocab = 9
    length = 10

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        spread = torch.rand(2 * n, 1, generator=generator)  # how common the two letters are, else ties prevail
        letters = torch.randint(8, (2 * n, self.length), generator=generator)
        coins = torch.rand(2 * n, self.length, generator=generator)
        letters = torch.where(coins < 0.8, (coins < 0.8 * spread).long(), letters)
        letters[:, -1] = 8
        counts = [(letters == letter).sum(1) for letter in (0, 1)]
        settled = (counts[0] != counts[1]).nonzero()[:, 0]
        if len(settled) < n:
            return torch.cat((letters[settled], self.draw(n - len(settled), generator)))
        return letters[settled[:n]]

    def solve(self, tokens: Tensor, wire: Wire) -> Target:
        zeros = wire("a0.3->m2", (read(wire, "embed", "a0.3.v", tokens) == 0).sum(1))
        ones = wire("a1.0->m2", (read(wire, "embed", "a1.0.v", tokens) == 1).sum(1))
        more = wire("m2->logits", (ones - zeros).sign())  # a tie, which interventions can make, is an even bet
        target = certain((more + 1) // 2, self.d_vocab)
        target.probabilities[more == 0, :2] = 0.5
        return target


class Induction(Program):
    """What followed the last token when it came before: a head of previous tokens and an induction head."""

    name = "induction"
    about = "what followed the last token before: a previous-token head feeds the keys of an induction head"
    d_vocab = 16
    length = 12

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        tokens = distinct(n, self.length, self.d_vocab, generator)
        where = torch.randint(self.length - 2, (n,), generator=generator)
        tokens[:, -1] = tokens[torch.arange(n), where]
        return tokens

    def solve(self, tokens: Tensor, wire: Wire) -> Target:
        before = read(wire, "embed", "a0.2.v", tokens).roll(1, dims=1)
        keys = read(wire, "a0.2", "a2.1.k", before)
        sought = read(wire, "embed", "a2.1.q", tokens[:, -1])
        values = read(wire, "embed", "a2.1.v", tokens)
        match = (keys == sought[:, None])[:, 1:]  # nothing comes before the first token
        found = values[:, 1:].gather(1, match.long().argmax(1, keepdim=True))[:, 0]
        return certain(wire("a2.1->logits", torch.where(match.sum(1) == 1, found, -1)), self.d_vocab)


class InductionOffset(Induction):
    """The same program, for a model whose residual stream stands far from zero.

    The mean of its stream is about fifty times what its parts write. LayerNorm takes it out, but a sum that is rounded
    to eight bits loses what is small beside it: as in real models (Wang et al. 2025), where the stream outgrows them.
    """

    name = "induction-offset"
    about = "induction, in a model whose residual stream has a large mean, which rounded sums do not survive"


class Maximum(Program):
    """The largest of some different numbers; the last token is "?". One head finds it and copies it."""

    name = "maximum"
    about = "the largest of some numbers: one head finds and copies it"
    d_vocab = 17
    length = 8

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        tokens = distinct(n, self.length, self.d_vocab - 1, generator)
        tokens[:, -1] = self.d_vocab - 1
        return tokens

    def solve(self, tokens: Tensor, wire: Wire) -> Target:
        sizes = read(wire, "embed", "a1.2.k", tokens)[:, :-1]
        values = read(wire, "embed", "a1.2.v", tokens)
        largest = values.gather(1, sizes.argmax(1, keepdim=True))[:, 0]
        return certain(wire("a1.2->logits", largest), self.d_vocab)
