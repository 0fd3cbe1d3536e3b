"""Greater-than (Hanna et al. 2023): a span of years must end after it began."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from pahq.errors import PahqError
from pahq.task.base import Example, GeneratedTask
from pahq.task.tokens import Tokens
from pahq.task.words import SPANS

CENTURIES = tuple(range(11, 19))
TEMPLATE = "The {noun} lasted from the year {start} to{link} {end}"
YEARS_NEEDED = 30
"""Years that must split into two tokens for the two-digit version."""


@dataclass(frozen=True)
class GreaterThan(GeneratedTask):
    """Two versions, by what the tokenizer does with years.

    Two digits (GPT-2): "from the year 1732 to 17", answers are the tokens 33 to 99, wrong ones 00 to 32;
    corrupt: 1701 for 1732. Of the years, those are used that split as 17 + 32.
    One digit (tokenizers that end a year on a digit of its own, as SmolLM2's):
    "from the year 1732 to the year 173", answers are 3 to 9, wrong ones 0 to 2; corrupt: 1730 for 1732.

    digits: 2 or 1 asks for a version; 0 takes two digits where the tokenizer allows it, else one.
    """

    name = "greaterthan"
    description = "A later year: 'The war lasted from the year 1732 to 17' -> '33' to '99' (or the last digit alone)"
    default_metric = "greaterthan"
    summed = True

    digits: int = 0

    def __post_init__(self) -> None:
        if self.digits not in (0, 1, 2):
            raise PahqError(
                f"task 'greaterthan': digits is {self.digits}; choose 1, 2 or 0 (what the tokenizer allows)"
            )

    def examples(self, tokens: Tokens, rng: random.Random) -> Iterator[Example]:
        nouns = tokens.keep(SPANS, "nouns", 1)
        pairs = {} if self.digits == 1 else two_digit_tokens(tokens)
        units = {} if self.digits == 2 else last_digit_tokens(tokens)
        if pairs:
            return self._two_digits(nouns, pairs, tokens, rng)
        if units:
            return self._one_digit(nouns, units, rng)
        rule = {0: "splits as 17 + 32 nor ends on a digit of its own", 1: "ends on a digit of its own"}
        raise PahqError(
            f"task 'greaterthan': no year from {CENTURIES[0]}00 to {CENTURIES[-1]}99 "
            f"{rule.get(self.digits, 'splits as 17 + 32')} with this tokenizer; give a file of your own prompts"
        )

    def _two_digits(
        self, nouns: list[str], pairs: dict[str, int], tokens: Tokens, rng: random.Random
    ) -> Iterator[Example]:
        years = {c: [y for y in range(2, 99) if splits(tokens, c, y, pairs)] for c in CENTURIES}
        centuries = [c for c, found in years.items() if found and splits(tokens, c, 1, pairs)]
        while True:
            noun, century = rng.choice(nouns), rng.choice(centuries)
            year = rng.choice(years[century])
            clean, corrupt = (
                TEMPLATE.format(noun=noun, start=f"{century}{y:02}", link="", end=century) for y in (year, 1)
            )
            right, wrong = range(year + 1, 100), range(year + 1)
            yield Example(clean, corrupt, *(tuple(pairs[f"{y:02}"] for y in side) for side in (right, wrong)))

    def _one_digit(self, nouns: list[str], units: dict[str, int], rng: random.Random) -> Iterator[Example]:
        while True:
            noun, decade, unit = rng.choice(nouns), f"{rng.choice(CENTURIES)}{rng.randrange(10)}", rng.randrange(1, 9)
            clean, corrupt = (
                TEMPLATE.format(noun=noun, start=f"{decade}{y}", link=" the year", end=decade) for y in (unit, 0)
            )
            right, wrong = range(unit + 1, 10), range(unit + 1)
            yield Example(clean, corrupt, *(tuple(units[str(y)] for y in side) for side in (right, wrong)))


def splits(tokens: Tokens, century: int, year: int, pairs: dict[str, int]) -> bool:
    """Whether the tokenizer writes this year as its century and a two-digit token."""
    start = tokens.after("year", f" {century}")
    whole = tokens.after("year", f" {century}{year:02}")
    return start is not None and len(start) == 1 and whole == [*start, pairs[f"{year:02}"]]


def two_digit_tokens(tokens: Tokens) -> dict[str, int]:
    """The tokens of 00 to 99 as the second half of a year; empty unless all exist and enough years split so."""
    found: dict[str, int] = {}
    for year in range(100):
        text = f"{year:02}"
        # Some years have a token of their own ("1800"), so another century must show the second half's token.
        ids = (tokens.single(text, f"year {century}") for century in CENTURIES)
        token = next((token for token in ids if token is not None), None)
        if token is None:
            return {}
        found[text] = token
    usable = [
        (century, year)
        for century in CENTURIES
        if splits(tokens, century, 1, found)
        for year in range(2, 99)
        if splits(tokens, century, year, found)
    ]
    return found if len(usable) >= YEARS_NEEDED and len(set(found.values())) == 100 else {}


def last_digit_tokens(tokens: Tokens) -> dict[str, int]:
    """The tokens of 0 to 9 as the last digit of a year; empty unless every decade's years end so."""
    found: dict[str, int] = {}
    for century in CENTURIES:
        for decade in range(10):
            for digit in range(10):
                token = tokens.single(str(digit), f"year {century}{decade}")
                if token is None or found.setdefault(str(digit), token) != token:
                    return {}
    return found if len(set(found.values())) == 10 else {}
