"""Differences along chains of states and their sums, against loops over the states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pahq.engine import chain
from random_models import drawn

SPINES = st.lists(st.booleans(), min_size=1, max_size=12)
SHAPES = st.sampled_from([(1,), (3,), (2, 5), (1, 2, 3)])


def parent(spine: list[bool], state: int) -> int:
    return max((earlier for earlier in range(state) if spine[earlier]), default=-1)


def loop_deltas(values: Tensor, tip: Tensor, spine: list[bool]) -> Tensor:
    before = [tip if parent(spine, i) < 0 else values[parent(spine, i)] for i in range(len(spine))]
    return torch.stack([value - other for value, other in zip(values, before, strict=True)])


def loop_sums(change: Tensor, tip: Tensor, spine: list[bool]) -> Tensor:
    out: list[Tensor] = []
    for i in range(len(spine)):
        out.append(change[i] + (tip if parent(spine, i) < 0 else out[parent(spine, i)]))
    return torch.stack(out)


def drawn_values(spine: list[bool], shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(len(spine), *shape, generator=draw, dtype=torch.float64),
        torch.randn(*shape, generator=draw, dtype=torch.float64),
    )


@drawn(100)
@given(spine=SPINES)
def test_parents(spine: list[bool]) -> None:
    assert chain.parents(spine) == [parent(spine, state) for state in range(len(spine))]


@drawn(100)
@given(spine=SPINES, shape=SHAPES, seed=st.integers(0, 1000))
def test_deltas(spine: list[bool], shape: tuple[int, ...], seed: int) -> None:
    values, tip = drawn_values(spine, shape, seed)
    before = values.clone()
    assert torch.equal(chain.deltas(values, tip, spine), loop_deltas(values, tip, spine))
    assert torch.equal(values, before)


@pytest.mark.parametrize("elements", [0, 1 << 40], ids=["loop", "cumsum"])
def test_sums(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either way of adding up, leaves included, and as the inverse of differences."""
    monkeypatch.setattr(chain, "LOOP_ELEMENTS", elements)

    @drawn(150)
    @given(spine=SPINES, shape=SHAPES, seed=st.integers(0, 1000))
    def run(spine: list[bool], shape: tuple[int, ...], seed: int) -> None:
        change, tip = drawn_values(spine, shape, seed)
        expected = loop_sums(change, tip, spine)
        torch.testing.assert_close(chain.sums(change.clone(), tip, spine), expected, rtol=0, atol=1e-13)
        there = chain.deltas(expected, tip, spine)
        torch.testing.assert_close(chain.sums(there, tip, spine), expected, rtol=0, atol=1e-13)

    run()


@pytest.mark.parametrize("elements", [0, 1 << 40], ids=["loop", "cumsum"])
def test_pieces(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """States a few at a time, each piece going on from the last value that a later state builds on."""
    monkeypatch.setattr(chain, "LOOP_ELEMENTS", elements)

    @drawn(100)
    @given(spine=SPINES, size=st.integers(1, 5), seed=st.integers(0, 1000))
    def run(spine: list[bool], size: int, seed: int) -> None:
        values, tip = drawn_values(spine, (4,), seed)
        whole = chain.deltas(values, tip, spine)
        changes, added, value_tip, sum_tip = [], [], tip, tip
        for begin in range(0, len(spine), size):
            part, some = values[begin : begin + size], spine[begin : begin + size]
            changes.append(chain.deltas(part, value_tip, some))
            value_tip = chain.last(part, value_tip, some)
            added.append(chain.sums(changes[-1].clone(), sum_tip, some))
            sum_tip = chain.last(added[-1], sum_tip, some)
        assert torch.equal(torch.cat(changes), whole)
        torch.testing.assert_close(torch.cat(added), values, rtol=0, atol=1e-13)

    run()


@drawn(50)
@given(spine=SPINES)
def test_last(spine: list[bool]) -> None:
    values, tip = drawn_values(spine, (2,), 0)
    on = [state for state, here in enumerate(spine) if here]
    assert torch.equal(chain.last(values, tip, spine), values[on[-1]] if on else tip)


def test_a_leaf_leaves_no_trace() -> None:
    """An error in a state that nothing builds on reaches no other state."""
    values = torch.arange(5.0)[:, None]
    spine = [True, False, True, False, True]
    change = chain.deltas(values, torch.zeros(1), spine)
    change[1] += 100.0
    out = chain.sums(change, torch.zeros(1), spine)
    assert out[:, 0].tolist() == [0.0, 101.0, 2.0, 3.0, 4.0]
