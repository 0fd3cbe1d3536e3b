"""Which rows of a prompt file belong together, and which of the three splits they go to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from pahq.task.base import SPLITS, share

FULLEST_FIRST = ("validation", "test", "train")
"""Where groups leave the splits uneven: a search needs prompts first, then the evaluation of what it found."""


def groups_of(pairs: Sequence[tuple[Hashable, Hashable]]) -> list[int]:
    """For every pair of prompts the number of its group.

    Pairs with a prompt in common, on whichever side, are of one group, and so are those that others link.
    """
    group = list(range(len(pairs)))

    def root(row: int) -> int:
        while group[row] != row:
            group[row] = row = group[group[row]]
        return row

    first: dict[Hashable, int] = {}
    for row, pair in enumerate(pairs):
        for prompt in pair:
            group[root(row)] = root(first.setdefault(prompt, row))
    return [root(row) for row in range(len(pairs))]


def linked(groups: Sequence[int]) -> bool:
    """Whether the rows are several and all of one group, which cannot be split."""
    return len(groups) > 1 and len(set(groups)) == 1


def deal(groups: Sequence[int], order: Sequence[int]) -> dict[str, list[int]]:
    """The rows of each split, as they stand in ``order``; their numbers depend on the groups' sizes alone.

    Groups stay whole, so that what is measured on one split has not been seen on another: the largest is dealt first,
    each to whichever split has fewest rows. Rows that are all of one group, or each of its own, are dealt in turn.
    """
    sizes = Counter(groups)
    if len(sizes) in (1, len(groups)):
        return {split: [row for at, row in enumerate(order) if share(at, split)] for split in SPLITS}
    hands = [0] * len(SPLITS)
    holder: dict[int, int] = {}
    for group in sorted(dict.fromkeys(groups[row] for row in order), key=lambda group: -sizes[group]):
        holder[group] = hands.index(min(hands))
        hands[holder[group]] += sizes[group]
    fullest = sorted(range(len(hands)), key=lambda hand: -hands[hand])
    return {
        split: [row for row in order if holder[groups[row]] == hand]
        for split, hand in zip(FULLEST_FIRST, fullest, strict=True)
    }
