"""What a task is, and how the generated ones draw their examples."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.model.transformer import Transformer
from pahq.task.prompts import Prompts, last_position
from pahq.task.score import accuracy
from pahq.task.tokens import Tokens

SPLITS = ("train", "validation", "test")
PAIR_METRICS = ("kl_div", "logit_diff", "docstring", "greaterthan", "nll", "match_nll", "l2")
"""What can be measured where an example has right and wrong answers."""

PROBES = 60
"""Examples looked at to find the commonest length."""
PATIENCE = 3000
"""Draws in a row without a new example after which a generator counts as exhausted."""


class Task(ABC):
    """A behaviour of a model, as a source of prompt pairs.

    name, description: for people. default_metric: the task's own one; metrics: the names that make sense for it.
    summed: accuracy compares summed probabilities of right and wrong answers, not the best of each.
    """

    name: str
    description: str
    default_metric: str
    metrics: tuple[str, ...] = PAIR_METRICS
    summed: bool = False

    @abstractmethod
    def prompts(self, model: Transformer, n: int, seed: int = 0, split: str = "validation") -> Prompts:
        """``n`` prompt pairs for the model's tokenizer, on its device.

        The three splits ``train``, ``validation`` and ``test`` of one seed share no example, and the first
        examples of a longer draw are those of a shorter one (but where an example's corrupt prompt is the next
        one's clean prompt, as in induction, the last one's is the first's). ``all`` is the three together.
        Raises PahqError if there are not enough examples, saying which rule left too few.
        """

    def accuracy(self, logits: Tensor, prompts: Prompts) -> float:
        """Share of positions read at which logits [N, P, V] prefer a right answer; see ``score.accuracy``."""
        return accuracy(logits, prompts, summed=self.summed)


@dataclass(frozen=True)
class Example:
    """One prompt pair as text. Answers are texts that continue the clean prompt, or token ids."""

    clean: str
    corrupt: str
    answers: tuple[str | int, ...]
    wrong: tuple[str | int, ...]


@dataclass(frozen=True)
class Encoded:
    """An example as token ids."""

    example: Example
    clean: list[int]
    corrupt: list[int]
    answers: list[int]
    wrong: list[int]


def check_request(task: str, n: int, split: str) -> None:
    """Raises PahqError for an impossible number of examples or an unknown split."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise PahqError(f"task '{task}': the number of examples is {n}; ask for at least 1")
    if split not in (*SPLITS, "all"):
        raise PahqError(f"task '{task}': split '{split}' is unknown; choose one of {', '.join(SPLITS)}, all")


def share(position: int, split: str) -> bool:
    """Whether the example at this position of a shuffled sequence belongs to ``split``: they are dealt in turn."""
    return split == "all" or SPLITS[position % len(SPLITS)] == split


@dataclass(frozen=True)
class GeneratedTask(Task):
    """A task whose examples are made from templates and word lists, for any tokenizer.

    prepend_bos: start every prompt with the beginning-of-sequence token (the papers' runs did not).
    """

    prepend_bos: bool = False

    @abstractmethod
    def examples(self, tokens: Tokens, rng: random.Random) -> Iterator[Example]:
        """Random examples of words that the tokenizer keeps. Raises PahqError if it keeps too few."""

    def prompts(self, model: Transformer, n: int, seed: int = 0, split: str = "validation") -> Prompts:
        check_request(self.name, n, split)
        tokens = Tokens(model, self.name, self.prepend_bos)
        length = self._length(tokens)
        chosen: list[Encoded] = []
        seen: set[str] = set()
        dropped: Counter[str] = Counter()
        idle = 0
        # A text as seed is hashed by the random module itself, the same in every process.
        for example in self.examples(tokens, random.Random(f"{self.name} {seed}")):
            if len(chosen) == n or idle == PATIENCE:
                break
            idle += 1
            if example.clean in seen:
                continue
            found = encode(tokens, example)
            if isinstance(found, Encoded) and len(found.clean) != length:
                found = f"it must have {length} tokens like most"
            if isinstance(found, str):
                dropped[found] += 1
                continue
            if share(len(seen), split):
                chosen.append(found)
            seen.add(example.clean)
            idle = 0
        if len(chosen) < n:
            why = f" (rule that dropped most candidates: {dropped.most_common(1)[0][0]})" if dropped else ""
            raise PahqError(
                f"task '{self.name}': {n} examples asked for, but split '{split}' has {len(chosen)} with this "
                f"tokenizer{why}; ask for fewer"
            )
        return to_prompts(chosen).to(model.device)

    def _length(self, tokens: Tokens) -> int:
        """The commonest length in tokens; it does not depend on the seed, nor on how many examples are asked for."""
        rules: Counter[str] = Counter()
        lengths: Counter[int] = Counter()
        for example in islice(self.examples(tokens, random.Random(self.name)), PROBES):
            found = encode(tokens, example)
            if isinstance(found, str):
                rules[found] += 1
            else:
                lengths[len(found.clean)] += 1
        if not lengths:
            raise PahqError(
                f"task '{self.name}': no prompt is left with this tokenizer, by the rule: "
                f"{rules.most_common(1)[0][0]}; give a file of your own prompts"
            )
        return max(lengths, key=lambda length: (lengths[length], -length))


def encode(tokens: Tokens, example: Example) -> Encoded | str:
    """Token ids of one example, or the rule that it breaks."""
    clean, corrupt = tokens.prompt(example.clean), tokens.prompt(example.corrupt)
    if len(clean) != len(corrupt):
        return "clean and corrupt must have the same number of tokens"
    if tokens.tokenizer.unk_token_id in (*clean, *corrupt):
        return "every word must be known to the tokenizer"
    sides: list[list[int]] = []
    for side in (example.answers, example.wrong):
        ids = [a if isinstance(a, int) else tokens.answer(example.clean, a) for a in side]
        if None in ids:
            return f"the answer must be one token (e.g. '{side[ids.index(None)]}')"
        sides.append([token for token in ids if token is not None])
    if set(sides[0]) & set(sides[1]):
        return "right and wrong answers must be different tokens"
    return Encoded(example, clean, corrupt, sides[0], sides[1])


def to_prompts(rows: list[Encoded]) -> Prompts:
    """Examples of one length, read at the last position."""
    return last_position(
        torch.tensor([row.clean for row in rows]),
        torch.tensor([row.corrupt for row in rows]),
        [row.answers for row in rows],
        [row.wrong for row in rows],
        tuple((row.example.clean, row.example.corrupt) for row in rows),
    )
