"""Three short tasks that small models do well: gendered pronoun, country and capital, subject and verb."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from pahq.errors import PahqError
from pahq.task.base import Example, GeneratedTask
from pahq.task.tokens import Tokens
from pahq.task.words import COUNTRIES, FEMALE, MALE, NUMBERS, PLACES

# The templates of one task have as many words, and so mostly as many tokens.
PRONOUN_TEMPLATES = (
    "When {name} came to the {place},",
    "When {name} got to the {place},",
    "Before {name} went to the {place},",
    "While {name} was at the {place},",
    "After {name} drove to the {place},",
)
CAPITAL_TEMPLATES = (
    "The capital of {country} is the city of",
    "The capital and largest city of {country} is",
    "The name of the capital of {country} is",
    "Today the capital city of {country} is called",
    "I know that the capital of {country} is",
    "We all know the capital of {country} is",
    "They said that the capital of {country} is",
    "She told me the capital of {country} is",
    "My teacher says the capital of {country} is",
    "Everyone knows that the capital of {country} is",
)
AGREEMENT_TEMPLATES = ("The {noun} near the {place}", "The {noun} behind the {place}", "The {noun} from the {place}")
VERBS = ((" is", " was", " has"), (" are", " were", " have"))
"""Of one, and of several."""


@dataclass(frozen=True)
class Pronoun(GeneratedTask):
    """Clean: a name of one gender. Corrupt: one of the other."""

    name = "pronoun"
    description = "Gendered pronoun: 'When Mary came to the shop,' -> ' she'"
    default_metric = "logit_diff"

    def examples(self, tokens: Tokens, rng: random.Random) -> Iterator[Example]:
        male, female = tokens.keep(MALE, "men's names", 2), tokens.keep(FEMALE, "women's names", 2)
        places = tokens.keep(PLACES, "places", 1)
        while True:
            sides = [(rng.choice(male), " he"), (rng.choice(female), " she")]
            rng.shuffle(sides)
            (clean, right), (corrupt, wrong) = sides
            template, place = rng.choice(PRONOUN_TEMPLATES), rng.choice(places)
            prompts = [template.format(name=name, place=place) for name in (clean, corrupt)]
            yield Example(prompts[0], prompts[1], (right,), (wrong,))


@dataclass(frozen=True)
class Capital(GeneratedTask):
    """Clean: a country. Corrupt: another one, whose capital is the wrong answer."""

    name = "capital"
    description = "Country and capital: 'The capital of France is the city of' -> ' Paris'"
    default_metric = "logit_diff"

    def examples(self, tokens: Tokens, rng: random.Random) -> Iterator[Example]:
        countries = tokens.keep(COUNTRIES, "countries", 2)
        countries = [c for c in countries if tokens.single(f" {COUNTRIES[c]}") is not None]
        if len(countries) < 2:
            raise PahqError(
                f"task '{self.name}': this tokenizer keeps fewer than 2 capitals as one token after a space; "
                "give a file of your own prompts"
            )
        while True:
            country, other = rng.sample(countries, 2)
            template = rng.choice(CAPITAL_TEMPLATES)
            prompts = [template.format(country=c) for c in (country, other)]
            yield Example(prompts[0], prompts[1], (f" {COUNTRIES[country]}",), (f" {COUNTRIES[other]}",))


@dataclass(frozen=True)
class Agreement(GeneratedTask):
    """Clean: a singular or plural subject. Corrupt: the same noun in the other number."""

    name = "agreement"
    description = "Subject and verb: 'The keys near the shop' -> ' are'"
    default_metric = "logit_diff"

    def examples(self, tokens: Tokens, rng: random.Random) -> Iterator[Example]:
        nouns = [noun for noun in tokens.keep(NUMBERS, "nouns", 1) if tokens.single(f" {NUMBERS[noun]}") is not None]
        if not nouns:
            raise PahqError(
                f"task '{self.name}': this tokenizer keeps no plural noun as one token after a space; "
                "give a file of your own prompts"
            )
        places = tokens.keep(PLACES, "places", 1)
        while True:
            noun, place, template = rng.choice(nouns), rng.choice(places), rng.choice(AGREEMENT_TEMPLATES)
            plural = rng.random() < 0.5
            forms = (NUMBERS[noun], noun) if plural else (noun, NUMBERS[noun])
            prompts = [template.format(noun=form, place=place) for form in forms]
            yield Example(prompts[0], prompts[1], VERBS[plural], VERBS[not plural])
