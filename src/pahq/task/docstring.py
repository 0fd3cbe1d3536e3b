"""Docstring (Heimersheim and Janiak 2023): the next argument to document, after two that are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from pahq.errors import PahqError
from pahq.task.base import Example, GeneratedTask
from pahq.task.tokens import Tokens
from pahq.task.words import ARGUMENTS, FUNCTIONS, NOUNS

ARGUMENTS_IN_ALL, DOCUMENTED = 6, 3
"""Arguments of the method, and those of its docstring, the one asked for included."""


@dataclass(frozen=True)
class Docstring(GeneratedTask):
    """A method with six arguments whose docstring explains two that follow each other, and goes on to the next.

    Corrupt: random names in the definition, and other random names in the docstring. Wrong answers: every
    other argument name in either prompt.

    leading: arguments before the first explained one. Small models lose count where it is not 0;
    the paper's prompts, for a model trained on code, have 2.
    """

    name = "docstring"
    description = "The next ':param' of a docstring: the argument that follows the two explained so far"
    default_metric = "docstring"

    leading: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.leading <= ARGUMENTS_IN_ALL - DOCUMENTED:
            raise PahqError(f"task 'docstring': leading is {self.leading}; give 0 to {ARGUMENTS_IN_ALL - DOCUMENTED}")

    def examples(self, tokens: Tokens, rng: random.Random) -> Iterator[Example]:
        total, explained = ARGUMENTS_IN_ALL, DOCUMENTED - 1
        names = tokens.keep(ARGUMENTS, "argument names", 2 * total + explained)
        nouns = tokens.keep(NOUNS, "nouns", 2 * explained + 3)
        functions = tokens.keep(FUNCTIONS, "function names", 1)
        while True:
            drawn = rng.sample(names, 2 * total + explained)
            clean, random_definition, random_docs = drawn[:total], drawn[total : 2 * total], drawn[2 * total :]
            words = rng.sample(nouns, 2 * explained + 3)
            function = rng.choice(functions)
            answer = clean[self.leading + explained]
            wrong = [name for name in drawn if name != answer]
            yield Example(
                method(function, clean, clean[self.leading : self.leading + explained], words),
                method(function, random_definition, random_docs, words),
                (f" {answer}",),
                tuple(f" {name}" for name in wrong),
            )


def method(function: str, arguments: list[str], documented: list[str], words: list[str]) -> str:
    """Source text of a method up to the next ``:param``: three words about it, two about each argument."""
    indent = " " * 8
    lines = [f"    def {function}(self, {', '.join(arguments)}):", f'{indent}"""{" ".join(words[:3])}', ""]
    for i, name in enumerate(documented):
        lines.append(f"{indent}:param {name}: {words[2 * i + 3]} {words[2 * i + 4]}")
    return "\n".join([*lines, f"{indent}:param"])
