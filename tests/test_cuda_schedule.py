"""The CUDA backend: the order its events make, on stand-ins everywhere and on a GPU where there is one."""

from __future__ import annotations

import weakref
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fake_cuda
import tiny
from fake_cuda import World
from pahq.precision import cuda
from pahq.precision.buffers import Loader
from pahq.precision.cuda import CudaScheduler
from pahq.precision.differentiable import differentiable
from pahq.precision.policy import get_policy
from pahq.precision.schedule import STREAMS, Done, make_scheduler
from pahq.precision.streamed import streamed
from pahq.precision.trace import Trace
from random_models import drawn
from test_schedule import Node, graphs

SUBSETS = [subset for count in range(4) for subset in combinations(STREAMS, count)]
DEVICE = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@drawn(60)
@given(nodes=graphs(failures=False), streams=st.sampled_from(SUBSETS), traced=st.booleans())
def test_events_order_what_depends(nodes: list[Node], streams: tuple[str, ...], traced: bool) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        world = fake_cuda.install(monkeypatch)
        scheduler = make_scheduler(DEVICE, streams, trace=Trace() if traced else None)
        dones: list[Done[int]] = []
        for index, node in enumerate(nodes):
            world.do(f"input {index}")
            after = [dones[i] for i in node.after]
            dones.append(scheduler.submit(node.stream, "work", lambda i=index: world.do(f"work {i}"), after))
            if node.joined:
                scheduler.join(dones[-1])
                world.do(f"joined {index}")
        for index, node in enumerate(nodes):
            lane = scheduler.lane(node.stream)
            for earlier in node.after:
                assert world.ordered(f"work {earlier}", f"work {index}")
            for earlier in range(index):
                if scheduler.lane(nodes[earlier].stream) == lane:
                    assert world.ordered(f"work {earlier}", f"work {index}")
            if lane != "load":  # what the caller made before may be read
                assert world.ordered(f"input {index}", f"work {index}")
            if node.joined:
                assert world.ordered(f"work {index}", f"joined {index}")
        if scheduler.trace is not None:
            assert len(scheduler.trace.spans()) == len(nodes)
        scheduler.close()


def test_streams_do_not_wait_for_each_other_without_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    world = fake_cuda.install(monkeypatch)
    scheduler = make_scheduler(DEVICE)
    world.do("input")
    for name in ("low", "load", "high"):
        scheduler.submit(name, name, lambda name=name: world.do(name))
    world.do("output")
    assert not world.ordered("input", "load")
    for one, other in (("low", "load"), ("low", "high"), ("load", "high"), ("low", "output")):
        assert not world.ordered(one, other)
    assert world.synchronized == 0  # the host waited for nothing


@drawn(60)
@given(
    keys=st.lists(st.integers(0, 4), min_size=1, max_size=20),
    ahead=st.lists(st.integers(0, 4), min_size=20, max_size=20),
    waits=st.lists(st.sampled_from(["use", "joined", "captured"]), min_size=20, max_size=20),
    slots=st.integers(1, 3),
    streams=st.sampled_from(SUBSETS),
)
def test_buffers_are_not_overwritten_while_read(
    keys: list[int], ahead: list[int], waits: list[str], slots: int, streams: tuple[str, ...]
) -> None:
    """Every read of a buffer comes after the copy that filled it and before the next copy into it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        world = fake_cuda.install(monkeypatch)
        scheduler = make_scheduler(DEVICE, streams)
        monkeypatch.setattr("pahq.precision.buffers._check_pinned", lambda key, source: None)
        history: dict[int, list[tuple[str, int]]] = {}  # by buffer: its copies and reads as issued

        def copier(source: tuple[Tensor, ...], memory: tuple[int, ...]) -> tuple[int, ...]:
            buffer = memory or (len(history),)
            history.setdefault(buffer[0], []).append(("copy", world.do("copy")))
            return buffer

        def read(buffer: int) -> None:
            history[buffer].append(("read", world.do("read")))

        loader = Loader[int](scheduler, lambda key: (), slots, copy=True, copier=copier)
        for key, guess, how in zip(keys, ahead, waits, strict=False):
            slot = loader.fetch(key)
            loader.prefetch(guess)
            if how == "use":  # named in after=, released after that use
                use = scheduler.submit("high", "use", lambda slot=slot: read(_buffer(slot.tensors)), [slot.ready])
                slot.release(use)
                continue
            scheduler.join(slot.ready)
            buffer = _buffer(slot.tensors)
            if how == "joined":
                read(buffer)
            else:  # a stream reads what the caller joined, and is not joined itself
                scheduler.submit("low", "use", lambda buffer=buffer: read(buffer))
            slot.release()
        for entries in history.values():
            for place, (what, one) in enumerate(entries):
                for kind, other in entries[place + 1 :]:
                    if what == "copy" or kind == "copy":
                        assert one in world.before[other], (what, kind)


def _buffer(memory: object) -> int:
    assert isinstance(memory, tuple)
    return memory[0]


def test_values_are_marked_for_every_stream_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    world = fake_cuda.install(monkeypatch)
    scheduler = make_scheduler(DEVICE)
    loaded = scheduler.submit("load", "weights", lambda: {"q": fake_cuda.on_device()})
    marks = loaded.result["q"].marks if loaded.result else set()
    assert not marks
    scheduler.submit("load", "same stream", lambda: None, [loaded])
    assert not marks
    scheduler.submit("high", "head", lambda: loaded.value, [loaded])
    assert len(marks) == 1
    scheduler.join(loaded)
    assert len(marks) == 2
    assert world.main.cuda_stream in marks


def test_captured_tensors_live_until_the_event_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = fake_cuda.install(monkeypatch)
    scheduler = make_scheduler(DEVICE)
    x = torch.zeros(3)
    seen = weakref.ref(x)
    scheduler.submit("low", "work", lambda: x.sum())
    x = torch.ones(1)  # the call's own cell now holds another tensor
    scheduler.submit("high", "other", lambda: None)
    assert seen() is not None
    world.passed = True
    scheduler.submit("high", "other", lambda: None)
    assert seen() is None
    assert x.numel() == 1


def test_pending_calls_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    world = fake_cuda.install(monkeypatch)
    monkeypatch.setattr(cuda, "MOST_HELD", 3)
    scheduler = make_scheduler(DEVICE)
    for _ in range(3):
        scheduler.submit("low", "work", lambda: None)
    assert world.synchronized == 0
    scheduler.submit("low", "work", lambda: None)
    assert world.synchronized == 1
    scheduler.close()
    assert world.synchronized == 4  # the three streams, not the device


def test_failures_are_carried_and_graphs_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    scheduler = make_scheduler(DEVICE)

    def fail() -> None:
        raise ValueError("no")

    failed = scheduler.submit("low", "fails", fail)
    following = scheduler.submit("high", "follows", lambda: None, [failed])
    with pytest.raises(ValueError, match="no"):
        scheduler.join(following)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(AssertionError, match="a CUDA graph cannot be captured"):
        scheduler.submit("low", "work", lambda: None)


def test_one_stream_alone_needs_no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    scheduler = make_scheduler(DEVICE, ())
    monkeypatch.setattr(torch.cuda, "Event", None)
    done = scheduler.submit("load", "weights", lambda: 3)
    scheduler.join(scheduler.submit("high", "head", lambda: done.value, [done]))
    assert scheduler.issued() == ()


# On a GPU


def busy(milliseconds: float) -> None:
    """Keeps the current stream busy without using the device."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))


@needs_gpu
@pytest.mark.parametrize("streams", SUBSETS)
def test_gpu_freed_memory_is_not_reused_too_early(streams: tuple[str, ...]) -> None:
    """Inputs and values are dropped at once and their memory filled with NaN, while the streams lag behind."""
    with make_scheduler(DEVICE, streams) as scheduler:
        results = []
        for index in range(50):
            x = torch.full((256, 256), float(index), device=DEVICE)

            def work(x: Tensor) -> Tensor:
                busy(0.2)
                return x + 1

            low = scheduler.submit("low", "low", lambda x=x: work(x))
            high = scheduler.submit("high", "high", lambda low=low: work(low.value), [low])
            del x, low
            torch.full((256, 256), float("nan"), device=DEVICE)
            scheduler.join(high)
            results.append(high.value.sum())
            del high
            torch.full((256, 256), float("nan"), device=DEVICE)
        assert torch.stack(results).tolist() == [65536.0 * (index + 2) for index in range(50)]


@needs_gpu
@pytest.mark.parametrize("streams", SUBSETS)
def test_gpu_buffers_hold_what_is_read(streams: tuple[str, ...]) -> None:
    host = {key: (torch.full((512, 512), float(key)).pin_memory(),) for key in range(5)}
    with make_scheduler(DEVICE, streams) as scheduler:
        loader: Loader[int] = Loader(scheduler, host.__getitem__)
        uses: list[tuple[int, Done[Tensor]]] = []
        for key in [0, 1, 2, 3, 4] * 8:
            slot = loader.fetch(key)
            loader.prefetch((key + 1) % 5)

            def use(slot: object = slot) -> Tensor:
                busy(0.3)
                return slot.tensors[0].mean()  # pyright: ignore[reportAttributeAccessIssue]  (bound early, untyped)

            uses.append((key, scheduler.submit("high", "use", use, [slot.ready])))
            slot.release(uses[-1][1])
        scheduler.join(*(done for _, done in uses))
        assert [done.value.item() for _, done in uses] == [float(key) for key, _ in uses]


@needs_gpu
def test_gpu_streamed_model_agrees_with_the_plain_one() -> None:
    plain = tiny.transformer(layers=4)
    tokens = torch.randint(0, tiny.WORDS, (4, 8), generator=torch.Generator().manual_seed(0))
    with make_scheduler(DEVICE) as scheduler:
        model = streamed(plain, DEVICE, scheduler, slab_bytes=13 * 32 * 4)
        expected = plain.to(DEVICE).forward(tokens.to(DEVICE))
        for _ in range(5):
            torch.testing.assert_close(model.forward(tokens.to(DEVICE)), expected, rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("policy", ["pahq", "pahq-values", "rtn"])
def test_gpu_streamed_model_in_low_precision_agrees_with_the_plain_one(policy: str) -> None:
    plain = tiny.transformer(layers=4)
    tokens = torch.randint(0, tiny.WORDS, (4, 8), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with make_scheduler(DEVICE) as scheduler:
        model = differentiable(streamed(plain, DEVICE, scheduler), get_policy(policy))
        expected = differentiable(plain.to(DEVICE), get_policy(policy)).forward(tokens)
        torch.testing.assert_close(model.forward(tokens), expected, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_gpu_trace_shows_streams_at_work_together() -> None:
    trace = Trace()
    with make_scheduler(DEVICE, trace=trace) as scheduler:
        dones = [scheduler.submit(name, name, lambda: busy(5)) for name in ("load", "low")]
        scheduler.join(*dones)
        assert isinstance(scheduler, CudaScheduler)
    assert trace.overlap("load", "low") > 0.5 * min(trace.busy("load"), trace.busy("low"))


def test_world_tells_order() -> None:
    """The stand-in itself: events order, and nothing else does."""
    world = World()
    other = fake_cuda.Stream(world)
    world.do("a")
    event = fake_cuda.Event(world)
    event.record(world.main)
    world.do("b")
    other.wait_event(event)
    world.current = other
    world.do("c")
    assert world.ordered("a", "c")
    assert not world.ordered("b", "c")
