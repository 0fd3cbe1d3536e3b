"""Chains of states: differences between neighbours, and sums of differences. Wang et al. 2025 quantise values;
a product's error then drowns the small difference that a decision rests on, so here the difference is quantised.

State i of a batch has as its parent the last earlier state on the spine (those that later states
build on), or else the base state. Leading dimension S: states; all sums are in the values' own type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOOP_ELEMENTS = 1 << 12
"""Numbers in one state from which on a CPU adds states one by one faster than by a cumulative sum."""


def parents(spine: Sequence[bool]) -> list[int]:
    """The parent of each state, -1 for the base."""
    found, last = [], -1
    for state, on_spine in enumerate(spine):
        found.append(last)
        if on_spine:
            last = state
    return found


def deltas(values: Tensor, tip: Tensor, spine: Sequence[bool]) -> Tensor:
    """values [S, …] of consecutive states, tip […] of the first one's parent -> value - parent's value [S, …]."""
    out, of = torch.empty_like(values), parents(spine)
    begin = 0
    while begin < len(of):
        if of[begin] < 0:
            torch.sub(values[begin], tip, out=out[begin])
            begin += 1
            continue
        end = begin + 1
        while end < len(of) and of[end] - end == of[begin] - begin:
            end += 1
        torch.sub(values[begin:end], values[of[begin] : of[begin] + end - begin], out=out[begin:end])
        begin = end
    return out


def sums(change: Tensor, tip: Tensor, spine: Sequence[bool], out: Tensor | None = None) -> Tensor:
    """The inverse of ``deltas``, into out [S, …], or else in place in change [S, …]."""
    of = parents(spine)
    if change.device.type == "cpu" and (change[0].numel() >= LOOP_ELEMENTS or len(of) == 1):
        out = change if out is None else out
        totals = out.unbind()
        for row, total, parent in zip(change.unbind(), totals, of, strict=True):
            torch.add(row, tip if parent < 0 else totals[parent], out=total)
        return out
    return _cumulated(change, tip, spine) if out is None else out.copy_(_cumulated(change, tip, spine))


def _cumulated(change: Tensor, tip: Tensor, spine: Sequence[bool]) -> Tensor:
    """``sums`` by a cumulative sum, in place: for a GPU, and for small states."""
    leaves = [state for state, on_spine in enumerate(spine) if not on_spine]
    if not leaves:
        return change.cumsum_(0).add_(tip)
    index = torch.tensor(leaves).to(change.device, non_blocking=True)  # else the host would wait for a GPU
    own = change[index]
    change[index] = 0.0
    change.cumsum_(0)
    change[index] += own
    return change.add_(tip)


def last(values: Tensor, tip: Tensor, spine: Sequence[bool]) -> Tensor:
    """The value that the next state's parent has: the last one on the spine, or still the tip."""
    for state in reversed(range(len(spine))):
        if spine[state]:
            return values[state]
    return tip
