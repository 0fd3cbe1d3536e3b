"""Induction: a text in which pairs of tokens come again, read where the first of a pair returns."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import torch

from pahq.errors import PahqError
from pahq.model.transformer import Transformer
from pahq.task.base import PATIENCE, Task, check_request, share
from pahq.task.prompts import Prompts, pad_ids
from pahq.task.tokens import CARRIER, Tokens
from pahq.task.words import ARGUMENTS, PLACES, THINGS

PHRASE = 8
"""Tokens of a phrase that comes again."""
COPY = 0.15
"""Chance that a phrase is copied where a new word could stand."""


@dataclass(frozen=True)
class Induction(Task):
    """Random words in which phrases come again; the answer at each position read is the next token.

    Read are the positions whose token stood in the text before, each time followed by the same token as now.
    Corrupt: the next example's text (batch shuffle). The paper took 300 tokens of web text for a 2-layer model;
    ``length`` (tokens, without a beginning-of-sequence token) is less here, so that larger models run it too.
    """

    name = "induction"
    description = "Induction: words of a phrase that comes again, '... cup river lamp ... cup river' -> ' lamp'"
    default_metric = "kl_div"
    metrics = ("kl_div", "nll", "match_nll", "l2")

    length: int = 64
    prepend_bos: bool = False

    def __post_init__(self) -> None:
        if self.length < 4 * PHRASE:
            raise PahqError(f"task 'induction': length is {self.length} tokens; give at least {4 * PHRASE}")

    def prompts(self, model: Transformer, n: int, seed: int = 0, split: str = "validation") -> Prompts:
        check_request(self.name, n, split)
        if n < 2:
            raise PahqError("task 'induction': the corrupted prompt is another example; ask for at least 2")
        tokens = Tokens(model, self.name, self.prepend_bos)
        words = tokens.keep(dict.fromkeys(ARGUMENTS + THINGS + PLACES), "words", 2 * PHRASE)
        rng = random.Random(f"{self.name} {seed}")
        texts: list[str] = []
        rows: list[list[int]] = []
        seen: set[str] = set()
        dropped = 0
        while len(rows) < n:
            text = CARRIER + "".join(f" {word}" for word in repeating(words, self.length, rng))
            ids = tokens.raw(text)[-self.length :]
            if text in seen or tokens.after(CARRIER, text[len(CARRIER) :]) != ids or not repeats(ids):
                dropped += 1
                if dropped > PATIENCE + 10 * n:
                    raise PahqError("task 'induction': this tokenizer keeps too few words as one token; use a file")
                continue
            if share(len(seen), split):
                texts.append(text[len(CARRIER) :])
                rows.append(tokens.prefix + ids)
            seen.add(text)
        return to_prompts(rows, texts).to(model.device)


def repeating(words: list[str], length: int, rng: random.Random) -> list[str]:
    """``length`` random words, in which phrases of ``PHRASE`` words are copied from earlier, by and by."""
    fresh = iter(())
    text: list[str] = []
    while len(text) < length:
        if len(text) >= 2 * PHRASE and rng.random() < COPY:
            start = rng.randrange(len(text) - 2 * PHRASE + 1)
            text += text[start : start + PHRASE]
            continue
        word = next(fresh, None)
        if word is None:  # every word once, in random order, then again
            fresh = iter(rng.sample(words, len(words)))
            word = next(fresh)
        text.append(word)
    return text[:length]


def repeats(ids: list[int]) -> list[int]:
    """Positions whose token stood before and was, each time, followed by the token that follows now."""
    after: dict[int, set[int]] = {}
    found = []
    for position, (token, following) in enumerate(pairwise(ids)):
        if after.get(token) == {following}:
            found.append(position)
        after.setdefault(token, set()).add(following)
    return found


def to_prompts(rows: list[list[int]], texts: list[str]) -> Prompts:
    """Token ids of equal length -> prompts read at all repeated pairs; corrupt is the next row, cyclically."""
    places = [repeats(row) for row in rows]
    answers = [[row[p + 1] for p in found] for row, found in zip(rows, places, strict=True)]
    clean, read = torch.tensor(rows), pad_ids(places)
    return Prompts(
        clean=clean,
        corrupt=clean.roll(-1, dims=0),
        read=read.clamp(min=0),
        read_mask=read >= 0,
        answers=pad_ids(answers)[..., None],
        wrong=torch.full((*read.shape, 1), -1),
        texts=tuple(zip(texts, [*texts[1:], texts[0]], strict=True)),
    )
