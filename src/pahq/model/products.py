"""Products of few rows with a large matrix, as an unembedding is: by blocks of it, side by side.

A CPU's library shares rows out among its threads: where there are few, some of them wait. Blocks of the matrix keep
all busy. (Elsewhere, and with many rows, it is one product.)
"""

from __future__ import annotations

import torch
from torch import Tensor

FEW_ROWS = 128
"""Up to so many rows blocks are faster."""
BLOCK = 1024
"""Columns of a wide matrix in a block; rows of a long one, at least: …"""
MOST_BLOCKS = 16
"""… every block of a long matrix gives a result of its own, and these are added up."""


def wide(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., k] @ weight [k, o] -> [..., o], o being large."""
    rows = x.reshape(-1, x.shape[-1])
    cut = _cut(rows, weight.shape[1], BLOCK)
    if not cut:
        return x @ weight
    blocks = weight[:, :cut].unflatten(1, (-1, BLOCK)).movedim(1, 0)  # [b, k, BLOCK], a view
    out = torch.bmm(rows.expand(len(blocks), *rows.shape), blocks).movedim(0, 1).reshape(len(rows), cut)
    if cut < weight.shape[1]:
        out = torch.cat((out, rows @ weight[:, cut:]), dim=-1)
    return out.view(*x.shape[:-1], -1)


def long(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., k] @ weight [k, o] -> [..., o], k being large."""
    rows = x.reshape(-1, x.shape[-1])
    block = max(BLOCK, weight.shape[0] // MOST_BLOCKS)
    cut = _cut(rows, weight.shape[0], block)
    if not cut:
        return x @ weight
    blocks = weight[:cut].unflatten(0, (-1, block))
    out = torch.bmm(rows[:, :cut].unflatten(1, (-1, block)).movedim(1, 0), blocks).sum(0)
    if cut < weight.shape[0]:
        out += rows[:, cut:] @ weight[cut:]
    return out.view(*x.shape[:-1], -1)


def _cut(rows: Tensor, size: int, block: int) -> int:
    """How much of a matrix's size goes into blocks."""
    few = rows.device.type == "cpu" and 0 < len(rows) <= FEW_ROWS
    return size - size % block if few and size >= 2 * block else 0
