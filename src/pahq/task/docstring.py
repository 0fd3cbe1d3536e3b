"""Docstring (Heimersheim and Janiak 2023): the next argument to document, after two that are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from pahq.task.base import Example, GeneratedTask
from pahq.task.tokens import Tokens
from pahq.task.words import ARGUMENTS, FUNCTIONS, NOUNS

LEADING, DOCUMENTED, TRAILING = 2, 3, 1
"""Arguments before the documented ones, the documented ones (the last is asked for), and after them."""


@dataclass(frozen=True)
class Docstring(GeneratedTask):
    """A method with six arguments whose docstring explains the third and fourth, and goes on to the fifth.

    Corrupt: random names in the definition, and other random names in the docstring. Wrong answers: every
    other argument name in either prompt.
    """

    name = "docstring"
    description = "The next ':param' of a docstring: the argument that follows the two explained so far"
    default_metric = "docstring"

    def examples(self, tokens: Tokens, rng: random.Random) -> Iterator[Example]:
        total = LEADING + DOCUMENTED + TRAILING
        explained = DOCUMENTED - 1
        names = tokens.keep(ARGUMENTS, "argument names", 2 * total + explained)
        nouns = tokens.keep(NOUNS, "nouns", 2 * explained + 2)
        functions = tokens.keep(FUNCTIONS, "function names", 1)
        while True:
            drawn = rng.sample(names, 2 * total + explained)
            clean, random_definition, random_docs = drawn[:total], drawn[total : 2 * total], drawn[2 * total :]
            words = rng.sample(nouns, 2 * explained + 2)
            function = rng.choice(functions)
            answer = clean[LEADING + explained]
            wrong = [name for name in drawn if name != answer]
            yield Example(
                method(function, clean, clean[LEADING : LEADING + explained], words),
                method(function, random_definition, random_docs, words),
                (f" {answer}",),
                tuple(f" {name}" for name in wrong),
            )


def method(function: str, arguments: list[str], documented: list[str], words: list[str]) -> str:
    """Source text of a method up to the next ``:param``."""
    lines = [f"def {function}(self, {', '.join(arguments)}):", f'    """{words[0]} {words[1]}', ""]
    for i, name in enumerate(documented):
        lines.append(f"    :param {name}: {words[2 * i + 2]} {words[2 * i + 3]}")
    return "\n".join([*lines, "    :param"])
