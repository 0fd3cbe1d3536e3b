"""Buffers of FP32 weights: nothing is read before it is there, nothing in use is overwritten."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pahq.errors import PahqError
from pahq.precision.buffers import Loader, Slot, assemble, pin
from pahq.precision.schedule import STREAMS, Done, Scheduler, make_scheduler
from random_models import drawn

WEIGHTS = {key: (torch.full((3, 4), float(key)), torch.full((5,), 10.0 * key)) for key in range(6)}


def loader_of(scheduler: Scheduler, slots: int = 2, copy: bool | None = True) -> Loader[int]:
    return Loader(scheduler, WEIGHTS.__getitem__, slots, copy)


def tensors_of(scheduler: Scheduler, slot: Slot) -> tuple[Tensor, ...]:
    scheduler.join(slot.ready)
    return slot.tensors


@drawn(60)
@given(
    keys=st.lists(st.integers(0, 5), min_size=1, max_size=25),
    ahead=st.lists(st.integers(0, 5), min_size=25, max_size=25),
    slots=st.integers(1, 3),
    threads=st.booleans(),
    copy=st.booleans(),
    streams=st.sampled_from([(), ("load",), ("low", "high"), STREAMS]),
)
def test_every_use_reads_the_weights_of_its_key(
    keys: list[int], ahead: list[int], slots: int, threads: bool, copy: bool, streams: tuple[str, ...]
) -> None:
    """The high stream works slowly, so that a copy which did not wait for it would be seen."""
    with make_scheduler("cpu", streams, threads) as scheduler:
        loader, uses = loader_of(scheduler, slots, copy), list[Done[float]]()
        for key, guess in zip(keys, ahead, strict=False):
            slot = loader.fetch(key)
            loader.prefetch(guess)

            def use(slot: Slot = slot) -> float:
                first = slot.tensors[0].sum().item() / 12
                threading.Event().wait(0.0005)
                return first if slot.tensors[0].sum().item() / 12 == first else float("nan")

            uses.append(scheduler.submit("high", f"use {key}", use, [slot.ready]))
            slot.release(uses[-1])
        scheduler.join(*uses)
        assert [use.value for use in uses] == [float(key) for key in keys[: len(uses)]]
        one = sum(tensor.nbytes for tensor in WEIGHTS[0])
        assert loader.device_bytes <= (slots * one if copy else 0)


def test_a_copy_waits_for_the_release_of_its_buffer() -> None:
    """A use that is held up holds up the copy into its buffer, and that alone."""
    gate = threading.Event()
    with make_scheduler("cpu", threads=True) as scheduler:
        loader = loader_of(scheduler)
        first, second = loader.fetch(1), loader.fetch(2)
        use = scheduler.submit(
            "high", "use", lambda: gate.wait(20) and first.ready.value[0][0, 0].item(), [first.ready]
        )
        scheduler.join(second.ready)  # its own copy went on meanwhile
        first.release(use)
        third = loader.fetch(3)
        assert third.ready.ticket is not None
        assert not third.ready.ticket.done()
        gate.set()
        assert tensors_of(scheduler, third)[0][0, 0] == 3
        scheduler.join(use)
        assert use.value == 1


def test_release_without_a_moment_waits_for_everything_issued() -> None:
    gate = threading.Event()
    with make_scheduler("cpu", threads=True) as scheduler:
        loader = loader_of(scheduler, slots=1)
        slot = loader.fetch(1)
        weight = tensors_of(scheduler, slot)[0]
        use = scheduler.submit("low", "use", lambda: gate.wait(20) and weight.sum().item())
        slot.release()
        following = loader.fetch(2)
        assert not following.ready.ticket.done()
        gate.set()
        scheduler.join(use, following.ready)
        assert use.value == 12


@pytest.mark.parametrize("later_first", [False, True])
def test_two_users_release_in_any_order(later_first: bool) -> None:
    gate = threading.Event()
    with make_scheduler("cpu", threads=True) as scheduler:
        loader = loader_of(scheduler, slots=1)
        one, two = loader.fetch(1), loader.fetch(1)
        early = scheduler.submit("high", "early", lambda: one.ready.value[0].sum().item(), [one.ready])
        late = scheduler.submit("high", "late", lambda: gate.wait(20) and two.ready.value[0].sum().item())
        for slot, done in [(two, late), (one, early)] if later_first else [(one, early), (two, late)]:
            with pytest.raises(AssertionError, match="no buffer is free for 2"):
                loader.fetch(2)
            slot.release(done)
        following = loader.fetch(2)
        threading.Event().wait(0.01)
        assert not following.ready.ticket.done()
        gate.set()
        scheduler.join(late, following.ready)
        assert late.value == 12


@pytest.mark.parametrize("threads", [False, True])
def test_what_is_there_or_on_its_way_is_not_copied_again(threads: bool) -> None:
    asked: list[int] = []

    def source(key: int) -> tuple[Tensor, ...]:
        asked.append(key)
        return WEIGHTS[key]

    with make_scheduler("cpu", threads=threads) as scheduler:
        loader = Loader(scheduler, source, copy=True)
        first = loader.fetch(1)
        assert loader.prefetch(2)
        assert loader.prefetch(2)
        second = loader.fetch(2)
        again = loader.fetch(1)
        assert asked == [1, 2]
        assert tensors_of(scheduler, again)[0] is tensors_of(scheduler, first)[0]
        assert not loader.prefetch(3)  # both in use
        before = tensors_of(scheduler, second)[0].data_ptr()
        second.release()
        assert tensors_of(scheduler, loader.fetch(2))[0][0, 0] == 2  # released, but still there
        assert asked == [1, 2]
        for slot in (first, again):
            slot.release()
        third = tensors_of(scheduler, loader.fetch(3))[0]
        assert third.data_ptr() != before
        assert loader.device_bytes == 2 * sum(tensor.nbytes for tensor in WEIGHTS[0])


def test_without_a_load_stream_nothing_is_prefetched() -> None:
    with make_scheduler("cpu", ("low", "high")) as scheduler:
        loader = loader_of(scheduler)
        assert not loader.prefetch(1)
        loader.fetch(1)
        assert loader.prefetch(1)


@pytest.mark.parametrize("threads", [False, True])
def test_the_order_of_submission_decides_who_may_still_use_a_slot(threads: bool) -> None:
    gate = threading.Event()
    with make_scheduler("cpu", threads=threads) as scheduler:
        slot = loader_of(scheduler).fetch(1)
        if threads:
            scheduler.submit("high", "busy", lambda: gate.wait(20))
        before = scheduler.submit("high", "before", lambda: slot.tensors[0].sum().item(), [slot.ready])
        slot.release(before)
        late = scheduler.submit("high", "late", lambda: slot.tensors[0].sum().item(), [slot.ready])
        gate.set()
        scheduler.join(before)
        assert before.value == 12
        with pytest.raises(AssertionError, match="slot of 1: used after its release"):
            scheduler.join(late)


@pytest.mark.parametrize("copy", [False, True])
def test_misuse_of_slots_is_refused(copy: bool) -> None:
    with make_scheduler("cpu") as scheduler:
        loader = loader_of(scheduler, copy=copy)
        slot, other = loader.fetch(1), loader.fetch(2)
        with pytest.raises(AssertionError, match="without waiting"):
            _ = slot.tensors
        with pytest.raises(AssertionError, match=r"no buffer is free for 3 \(in use: 1, 2\)"):
            loader.fetch(3)
        scheduler.join(slot.ready, other.ready)
        slot.release()
        with pytest.raises(AssertionError, match=r"slot of 1: used after its release \(its buffer may be replaced"):
            _ = slot.tensors
        with pytest.raises(AssertionError, match="slot of 1: released twice"):
            slot.release()
        loader.fetch(3)
        with pytest.raises(AssertionError, match=r"slot of 1: used after its release \(its buffer was replaced"):
            _ = slot.tensors
        assert other.tensors[0][0, 0] == 2


def test_on_a_cpu_the_weights_are_used_where_they_are() -> None:
    with make_scheduler("cpu") as scheduler:
        loader = loader_of(scheduler, copy=None)
        assert tensors_of(scheduler, loader.fetch(1))[0] is WEIGHTS[1][0]
        assert loader.device_bytes == 0
    assert pin(WEIGHTS[1][0], torch.device("cpu")) is WEIGHTS[1][0]
    with pytest.raises(AssertionError, match="at least one"):
        loader_of(scheduler, slots=0)


def test_buffers_follow_shapes_and_strides() -> None:
    shapes = {0: torch.randn(3, 4), 1: torch.randn(4, 3).T, 2: torch.randn(2, 2), 3: torch.randn(2, 2)}
    with make_scheduler("cpu") as scheduler:
        loader: Loader[int] = Loader(scheduler, lambda key: (shapes[key],), 1, copy=True)
        places = []
        for key, weight in shapes.items():
            slot = loader.fetch(key)
            (copy,) = tensors_of(scheduler, slot)
            assert torch.equal(copy, weight)
            assert copy.stride() == weight.stride()
            places.append(copy.data_ptr())
            slot.release()
        assert places[2] == places[3]


@pytest.mark.parametrize("threads", [False, True])
def test_a_copy_that_fails_says_so_where_it_is_used(threads: bool) -> None:
    def copier(source: tuple[Tensor, ...], memory: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        raise MemoryError("device full")

    with make_scheduler("cpu", threads=threads) as scheduler:
        loader = Loader(scheduler, WEIGHTS.__getitem__, copy=True, copier=copier)
        slot = loader.fetch(1)
        use = scheduler.submit("high", "use", lambda: slot.tensors, [slot.ready])
        with pytest.raises(MemoryError, match="device full"):
            scheduler.join(use)


@given(
    heads=st.integers(1, 5), first=st.integers(0, 4), count=st.integers(1, 4), dim=st.integers(0, 1), one=st.booleans()
)
@drawn(40)
def test_assembly_writes_its_slots_and_no_other(heads: int, first: int, count: int, dim: int, one: bool) -> None:
    low = torch.randn(heads, heads, 3)
    fits = first < heads if one else first + count <= heads
    shape = [heads, heads, 3]
    shape[dim] = count
    high = torch.randn(*shape)
    high = high.select(dim, 0) if one else high
    where = first if one else slice(first, first + count)
    if not fits:
        with pytest.raises(PahqError, match=r"^assembly: slots? "):
            assemble(low, where, high, dim)
        return
    plain = low.clone().numpy()
    plain[(slice(None),) * dim + (where,)] = high.numpy()
    assert assemble(low, where, high, dim) is low
    assert torch.equal(low, torch.from_numpy(plain))


def test_assembly_names_what_does_not_fit() -> None:
    low, high = torch.zeros(4, 2, 3), torch.zeros(2, 3)
    for bad, message in [
        ((low.bfloat16(), 0, high), "the low stream's tensor is torch.bfloat16"),
        ((low, 0, high.double()), "the high stream's tensor is torch.float64"),
        ((low, 0, high.to("meta")), "the high stream's on meta"),
        ((low, 0, high.T), r"has shape \[3, 2\], its place \[2, 3\]"),
        ((low, 0, high[:1]), r"has shape \[1, 3\], its place \[2, 3\]"),  # would broadcast
        ((low, -1, high), "slot -1 is not one of the 4"),
        ((low, 4, high), "slot 4 is not one of the 4"),
        ((low, slice(3, 5), low[:2]), "slots 3:5 are not in the 4"),
        ((low, slice(0, 4, 2), low[:2]), "slots 0:4 are not in the 4"),
    ]:
        with pytest.raises(PahqError, match=f"^assembly: .*{message}"):
            assemble(*bad)
    assert not low.any()
