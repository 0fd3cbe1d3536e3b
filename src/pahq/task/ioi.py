"""Indirect object identification (Wang et al. 2022): who is given the thing, of two people named before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from pahq.errors import PahqError
from pahq.task.base import Example, GeneratedTask
from pahq.task.tokens import Tokens
from pahq.task.words import NAMES, PLACES, THINGS

# One word is one token in most vocabularies, so these are all of one length (15 tokens).
TEMPLATES = (
    "Then, {x} and {y} went to the {place}. {s} gave a {thing} to",
    "Later, {x} and {y} came to the {place}. {s} handed a {thing} to",
    "Today, {x} and {y} met at the {place}. {s} gave the {thing} to",
    "Again, {x} and {y} sat in the {place}. {s} gave a {thing} to",
    "Now, {x} and {y} stood in the {place}. {s} handed the {thing} to",
    "First, {x} and {y} went to the {place}. {s} gave a {thing} to",
    "Here, {x} and {y} met in the {place}. {s} handed a {thing} to",
    "Soon, {x} and {y} drove to the {place}. {s} gave the {thing} to",
)


@dataclass(frozen=True)
class Ioi(GeneratedTask):
    """Clean: two names, one of them again, the other asked for. Corrupt: three other names (ABC).

    The name asked for comes first (ABBA) or second (BABA), equally often.
    templates: how many wordings are mixed; one, as in the published ACDC runs, unless more are asked for.
    """

    name = "ioi"
    description = "Indirect object: 'Then, Mary and John went to the shop. John gave a drink to' -> ' Mary'"
    default_metric = "logit_diff"
    templates: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.templates <= len(TEMPLATES):
            raise PahqError(f"task 'ioi': templates is {self.templates}; choose 1 to {len(TEMPLATES)}")

    def examples(self, tokens: Tokens, rng: random.Random) -> Iterator[Example]:
        names = tokens.keep(NAMES, "first names", 5)
        places = tokens.keep(PLACES, "places", 1)
        things = tokens.keep(THINGS, "objects", 1)
        while True:
            indirect, subject, *others = rng.sample(names, 5)
            pair = [indirect, subject] if rng.random() < 0.5 else [subject, indirect]
            words = {"place": rng.choice(places), "thing": rng.choice(things)}
            template = rng.choice(TEMPLATES[: self.templates])
            clean = template.format(x=pair[0], y=pair[1], s=subject, **words)
            corrupt = template.format(x=others[0], y=others[1], s=others[2], **words)
            yield Example(clean, corrupt, (f" {indirect}",), (f" {subject}",))
