"""The task made of the user's own prompt pairs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from pahq.errors import PahqError
from pahq.model.transformer import Transformer
from pahq.task.base import SPLITS, Task, check_request
from pahq.task.files import Row, read_rows
from pahq.task.greaterthan import two_digit_tokens
from pahq.task.prompts import Prompts, pad_ids
from pahq.task.splits import deal, groups_of, linked
from pahq.task.tokens import Tokens

RowIds = tuple[list[int], list[int], list[int], list[int]]
"""Ids of a row's clean prompt, of its corrupt one, of its right answers and of its wrong ones."""


@dataclass
class FileTask(Task):
    """Prompt pairs of a file, read at their last token.

    The rows, shuffled by the seed, are dealt to the three splits, those that share a prompt to the same one (see
    ``splits.deal``); split ``all`` takes them in file order.
    pad: allow prompts of unequal length (padded on the right; the padding is never read). The two prompts of
    one pair must have the same length even so. prepend_bos: start every prompt with that token.
    Rows with a year for a label are greater-than prompts: right is every later year of the century.
    """

    path: Path
    pad: bool = False
    prepend_bos: bool = False
    rows: list[Row] = field(init=False, repr=False)

    default_metric = "logit_diff"

    def __post_init__(self) -> None:
        self.rows = read_rows(self.path)
        self.name = str(self.path)
        self.description = f"{len(self.rows)} prompt pairs of {self.path.name}"
        if linked(groups_of([(row.clean, row.corrupt) for row in self.rows])):
            self.description += " (shared prompts link them all, so that its splits share prompts, too)"
        if all(row.year is not None for row in self.rows):
            self.default_metric, self.summed = "greaterthan", True

    def available(self, split: str, model: Transformer | None = None) -> int:
        """How many rows the split has, whatever the seed.

        model: whose tokens tell prompts apart, as in ``prompts``; their texts do without one.
        Raises PahqError for an unknown split, and for rows that do not suit the model's tokenizer.
        """
        check_request(self.name, 1, split)
        if model is None:
            groups = groups_of([(row.clean, row.corrupt) for row in self.rows])
        else:
            groups = _groups(self._encoded(Tokens(model, self.name, self.prepend_bos)))
        return len(self._chosen(groups, 0, split))

    def prompts(self, model: Transformer, n: int, seed: int = 0, split: str = "validation") -> Prompts:
        check_request(self.name, n, split)
        tokens = Tokens(model, self.name, self.prepend_bos)
        if self.pad and not model.config.causal:
            raise PahqError(
                f"{self.path}: padding would be seen by {model.config.name}, which is not causal; leave pad off"
            )
        # Every row, so that no fault depends on the seed; and first, so that more rows are not asked for in vain.
        encoded = self._encoded(tokens)
        groups = _groups(encoded)
        chosen = self._chosen(groups, seed, split)
        if len(chosen) < n:
            kept = ", those with a prompt in common together" if 1 < len(set(groups)) < len(groups) else ""
            whole = "" if split == "all" else f" ({len(SPLITS)} splits share {len(groups)} rows{kept})"
            raise PahqError(
                f"{self.path}: {n} examples asked for, but split '{split}' has {len(chosen)}{whole}; "
                f"{f'ask for at most {len(chosen)} (n) or ' if chosen else ''}add rows"
            )
        if not self.pad:
            first = len(encoded[0][0])
            for row, (clean, *_) in zip(self.rows, encoded, strict=True):
                if len(clean) != first:
                    raise PahqError(
                        f"{self.path}: {row.where} has {len(clean)} tokens, but {self.rows[0].where} has {first}; "
                        "make all prompts equally long, or allow padding (pad)"
                    )
        return _pack(
            [encoded[index] for index in chosen[:n]],
            tuple((self.rows[index].clean, self.rows[index].corrupt) for index in chosen[:n]),
            tokens.tokenizer.eos_token_id or 0,
            self.pad,
        ).to(model.device)

    def _chosen(self, groups: list[int], seed: int, split: str) -> list[int]:
        """The split's rows, as the seed orders them."""
        order = list(range(len(self.rows)))
        if split == "all":
            return order
        random.Random(f"rows {seed}").shuffle(order)
        return deal(groups, order)[split]

    def _encoded(self, tokens: Tokens) -> list[RowIds]:
        return [self._encode(tokens, row) for row in self._answered(tokens)]

    def _answered(self, tokens: Tokens) -> list[Row]:
        """The rows, with answers in place of years: the tokens of two digits above the year, and of the others."""
        labelled = next((row for row in self.rows if row.year is not None), None)
        if labelled is None:
            return self.rows
        years = [token for _, token in sorted(two_digit_tokens(tokens).items())]
        if not years:
            raise PahqError(
                f"{self.path}: {labelled.where}: a label needs a tokenizer with one token for a year's last two "
                "digits, as GPT-2's; give answers and wrong_answers instead"
            )
        return [
            row
            if row.year is None
            else replace(row, answers=tuple(years[row.year + 1 :]), wrong=tuple(years[: row.year + 1]))
            for row in self.rows
        ]

    def _encode(self, tokens: Tokens, row: Row) -> RowIds:
        clean, corrupt = tokens.prompt(row.clean), tokens.prompt(row.corrupt)
        if not clean or len(clean) != len(corrupt):
            raise PahqError(
                f"{self.path}: {row.where}: clean has {len(clean)} tokens and corrupt {len(corrupt)}; make them equal"
            )
        if clean == corrupt:
            same = "the same" if row.clean == row.corrupt else "the same tokens"
            raise PahqError(
                f"{self.path}: {row.where}: clean and corrupt are {same}; change in corrupt what the answer depends on"
            )
        for token in (*clean, *corrupt):
            if not 0 <= token < tokens.d_vocab:
                raise PahqError(f"{self.path}: {row.where}: token {token} is not in the model's vocabulary")
        right, wrong = ([self._answer(tokens, row, a) for a in side] for side in (row.answers, row.wrong))
        both = set(right) & set(wrong)
        if both:
            text = tokens.decode([min(both)])
            raise PahqError(f"{self.path}: {row.where}: '{text}' is a right and a wrong answer; remove one")
        return clean, corrupt, right, wrong

    def _answer(self, tokens: Tokens, row: Row, answer: str | int) -> int:
        if isinstance(answer, int):
            if not 0 <= answer < tokens.d_vocab:
                raise PahqError(
                    f"{self.path}: {row.where}: answer token {answer} is not among the model's {tokens.d_vocab}; "
                    "the file was made for another tokenizer"
                )
            return answer
        token = tokens.answer(row.clean, answer)
        if token is None:
            count = len(tokens.after(row.clean, answer) or tokens.raw(answer))
            why = f"{count} tokens" if count != 1 else "no token of its own that continues the prompt"
            raise PahqError(
                f"{self.path}: {row.where}: answer '{answer}' is {why} with this tokenizer; it must be one "
                "(mind the space before it)"
            )
        return token


def _groups(encoded: list[RowIds]) -> list[int]:
    return groups_of([(tuple(clean), tuple(corrupt)) for clean, corrupt, *_ in encoded])


def _pack(
    rows: list[RowIds],
    texts: tuple[tuple[str, str], ...],
    filler: int,
    pad: bool,
) -> Prompts:
    """Pads on the right and reads each row at its own last token."""
    lengths = [len(clean) for clean, *_ in rows]
    longest = max(lengths)
    clean, corrupt = (
        torch.tensor([row[side] + [filler] * (longest - len(row[side])) for row in rows]) for side in (0, 1)
    )
    read = torch.tensor(lengths)[:, None] - 1
    return Prompts(
        clean=clean,
        corrupt=corrupt,
        read=read,
        read_mask=torch.ones_like(read, dtype=torch.bool),
        answers=pad_ids([row[2] for row in rows])[:, None, :],
        wrong=pad_ids([row[3] for row in rows])[:, None, :],
        pad=torch.arange(longest) > read if pad else None,
        texts=texts,
    )
