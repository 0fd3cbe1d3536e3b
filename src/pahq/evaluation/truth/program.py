"""A small program over tokens whose every step is placed in a transformer: the causal model that one is trained to be.

A program is an ordinary function of tokens that passes each value through ``wire`` where the transformer carries it
along an edge. So the same few lines give the right answer, the list of edges that the answer comes by, and the
answer after any interchange intervention (Geiger et al. 2021): some edges bring what they bring on another input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Wire = Callable[[str, Tensor], Tensor]
"""An edge's name and the value it carries, [n] or [n, T] of any type -> the value that arrives, of the same shape."""


@dataclass(frozen=True)
class Target:
    """What the last position should say. probabilities: float32 [n, d_vocab], rows sum to 1.

    defined: bool [n], False where interventions left the program without an answer; that row means nothing.
    """

    probabilities: Tensor
    defined: Tensor


class Program(ABC):
    """An algorithm on prompts of ``length`` tokens below ``d_vocab``; the answer follows the last token.

    Only edges that carry what depends on the tokens count: positions are the same in any two prompts, so that an
    edge which brings them alone carries the same value in both, and no interchange can tell that it is there.
    """

    name: str
    about: str
    d_vocab: int
    length: int

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Random prompts, int64 [n, length]; each two in a row (2i, 2i + 1) may be related."""

    @abstractmethod
    def solve(self, tokens: Tensor, wire: Wire) -> Target:
        """The answer to prompts [n, length]."""

    def edges(self) -> list[str]:
        """Names of the edges that values are passed along, in the order of the program."""
        found: dict[str, None] = {}

        def note(edge: str, value: Tensor) -> Tensor:
            found[edge] = None
            return value

        self.solve(self.draw(2, torch.Generator().manual_seed(0)), note)
        return list(found)


def untouched(edge: str, value: Tensor) -> Tensor:
    """The wire that changes nothing."""
    return value


def interchanged(program: Program, base: Tensor, source: Tensor, swapped: Mapping[str, Tensor]) -> Target:
    """The program's answer to ``base`` where some edges carry what they carry on ``source`` (both [n, length]).

    swapped: an edge's name -> bool [n], the examples in which it does; edges that are not named do in none.
    """
    seen: dict[str, Tensor] = {}

    def record(edge: str, value: Tensor) -> Tensor:
        seen[edge] = value
        return value

    def swap(edge: str, value: Tensor) -> Tensor:
        where = swapped.get(edge)
        return value if where is None else torch.where(where.view(-1, *[1] * (value.ndim - 1)), seen[edge], value)

    program.solve(source, record)
    return program.solve(base, swap)


def read(wire: Wire, sender: str, receiver: str, value: Tensor) -> Tensor:
    """Along an addition edge into a query, key or value, and along that receiver's direct edge."""
    return wire(f"direct->{receiver}", wire(f"{sender}->{receiver}", value))


def certain(answer: Tensor, d_vocab: int) -> Target:
    """The target that is one token: answer int64 [n], below 0 where there is none."""
    return Target(torch.nn.functional.one_hot(answer.clamp(min=0), d_vocab).float(), answer >= 0)


def distinct(n: int, count: int, symbols: int, generator: torch.Generator) -> Tensor:
    """n rows of ``count`` different numbers below ``symbols``, in random order: int64 [n, count]."""
    return torch.rand(n, symbols, generator=generator).argsort(dim=1)[:, :count]
