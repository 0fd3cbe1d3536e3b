"""The scheduler: its backends do the same work in an order that the submitted graph allows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pahq.errors import PahqError
from pahq.precision.cuda import captured, tensors
from pahq.precision.schedule import CALLER, STREAMS, Done, Scheduler, make_scheduler, parse_streams
from pahq.precision.trace import Trace
from pahq.precision.virtual import Cost, VirtualScheduler
from random_models import drawn

SUBSETS = [subset for count in range(4) for subset in combinations(STREAMS, count)]

SIX = torch.ones(6)


@dataclass(frozen=True)
class Node:
    """One call: its stream, the earlier calls it comes after, whether it fails, and whether the caller joins it."""

    stream: str
    after: tuple[int, ...]
    fails: bool
    joined: bool


@st.composite
def graphs(draw: st.DrawFn, failures: bool = True) -> list[Node]:
    nodes = []
    for index in range(draw(st.integers(1, 14))):
        after = draw(st.sets(st.integers(0, index - 1), max_size=3)) if index else set()
        fails = failures and draw(st.integers(0, 9)) == 0
        nodes.append(Node(draw(st.sampled_from(STREAMS)), tuple(sorted(after)), fails, draw(st.booleans())))
    return nodes


def expected(nodes: list[Node]) -> list[int | ValueError]:
    """What each call gives, computed one after the other; a failure passes to all that come after it."""
    out: list[int | ValueError] = []
    for index, node in enumerate(nodes):
        failed = next((out[i] for i in node.after if isinstance(out[i], ValueError)), None)
        if failed is not None:
            out.append(failed)
        elif node.fails:
            out.append(ValueError(index))
        else:
            out.append(1 + index + 3 * sum(v for v in (out[i] for i in node.after) if isinstance(v, int)) % 1000003)
    return out


def execute(scheduler: Scheduler, nodes: list[Node]) -> tuple[list[Done[int]], list[tuple[str, int]]]:
    """Submits a graph; -> its Dones, and the log of beginnings and ends as they happened."""
    log: list[tuple[str, int]] = []
    dones: list[Done[int]] = []

    def call(index: int) -> int:
        log.append(("begin", index))
        node = nodes[index]
        time.sleep(0.0002 * (index * 7 % 3))  # so that workers get in each other's way
        try:
            if node.fails:
                raise ValueError(index)
            return 1 + index + 3 * sum(dones[i].value for i in node.after) % 1000003
        finally:
            log.append(("end", index))

    for index, node in enumerate(nodes):
        after = [dones[i] for i in node.after]
        dones.append(scheduler.submit(node.stream, f"call {index}", lambda i=index: call(i), after))
        if node.joined:
            try:
                scheduler.join(dones[-1])
            except ValueError:
                assert isinstance(expected(nodes)[index], ValueError)
            assert ("begin", index) not in log or ("end", index) in log
    return dones, log


@drawn(60)
@given(nodes=graphs(), threads=st.booleans(), streams=st.sampled_from(SUBSETS))
def test_backends_agree_with_plain_evaluation(nodes: list[Node], threads: bool, streams: tuple[str, ...]) -> None:
    with make_scheduler("cpu", streams, threads) as scheduler:
        dones, log = execute(scheduler, nodes)
        for done, value in zip(dones, expected(nodes), strict=True):
            if isinstance(value, ValueError):
                with pytest.raises(ValueError, match=f"^{value.args[0]}$"):
                    scheduler.join(done)
                with pytest.raises(ValueError, match=f"^{value.args[0]}$"):
                    _ = done.value
            else:
                scheduler.join(done)
                assert done.value == value
    place = {entry: position for position, entry in enumerate(log)}
    began = [index for what, index in log if what == "begin"]
    lanes = {CALLER: list[int](), **{name: list[int]() for name in streams}}
    for index in began:
        lanes[scheduler.lane(nodes[index].stream)].append(index)
        for earlier in nodes[index].after:
            assert place["end", earlier] < place["begin", index]
    for lane in lanes.values():
        assert lane == sorted(lane)
        for one, other in pairwise(lane):
            assert place["end", one] < place["begin", other]


@drawn(60)
@given(nodes=graphs(failures=False), streams=st.sampled_from(SUBSETS), seed=st.integers(0, 99))
def test_virtual_times_are_those_of_the_longest_path(nodes: list[Node], streams: tuple[str, ...], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    costs = torch.randint(1, 20, (len(nodes), 2), generator=draw).tolist()
    scheduler = VirtualScheduler(streams)
    dones: list[Done[Cost]] = []
    for (device, host), node in zip(costs, nodes, strict=True):
        dones.append(
            scheduler.submit(
                node.stream, "work", lambda d=device, h=host: Cost(float(d), float(h)), [dones[i] for i in node.after]
            )
        )

    # the slow twin: every rule as an explicit predecessor
    issued, ends = 0.0, list[float]()
    for index, ((device, host), node) in enumerate(zip(costs, nodes, strict=True)):
        lane = scheduler.lane(node.stream)
        before = [ends[i] for i in node.after]
        for other in range(index):
            theirs = scheduler.lane(nodes[other].stream)
            if theirs == lane or (theirs == CALLER and lane != "load"):
                before.append(ends[other])
        begin = max([issued, *before])
        issued += host
        ends.append(max(begin + device, issued))
        if node.stream == "load" and lane == CALLER:
            issued = max(issued, ends[-1])
    assert [done.ticket for done in dones] == ends
    assert scheduler.finish() == max([issued, *ends])


@pytest.mark.parametrize("threads", [False, True])
def test_a_value_is_refused_to_those_who_did_not_wait(threads: bool) -> None:
    with make_scheduler("cpu", threads=threads) as scheduler:
        first = scheduler.submit("load", "weights", lambda: 1)
        with pytest.raises(AssertionError, match=r"'weights' of stream load was used on caller without waiting"):
            _ = first.value
        hasty = scheduler.submit("high", "head", lambda: first.value)
        with pytest.raises(AssertionError, match="used on high without waiting"):
            scheduler.join(hasty)
        patient = scheduler.submit("high", "head", lambda: first.value, [first])
        later = scheduler.submit("high", "later", lambda: first.value)  # same stream, after one that waited
        scheduler.join(patient, later)
        assert patient.value == later.value == 1
        same = scheduler.submit("load", "more", lambda: first.value + 1)  # a stream is in order by itself
        scheduler.join(same)
        assert same.value == 2
    with make_scheduler("cpu", ("low", "high"), threads) as scheduler:
        assert scheduler.submit("load", "weights", lambda: 1).value == 1  # folded: done in the caller's order


@pytest.mark.parametrize("threads", [False, True])
def test_calls_run_without_gradients_and_submit_nothing(threads: bool) -> None:
    with make_scheduler("cpu", threads=threads) as scheduler:
        weight = torch.ones(2, requires_grad=True)
        done = scheduler.submit("low", "product", lambda: (weight * 2).requires_grad)
        nested = scheduler.submit("low", "nested", lambda: scheduler.submit("low", "inner", int))
        scheduler.join(done)
        assert done.value is False
        with pytest.raises(AssertionError, match="not from inside a call"):
            scheduler.join(nested)
        assert torch.is_grad_enabled()


def test_worker_threads_work_at_the_same_time() -> None:
    """Three calls that can end only together: in any order on fewer threads they would never."""
    trace, meeting = Trace(), threading.Barrier(3, timeout=20)
    with make_scheduler("cpu", threads=True, trace=trace) as scheduler:
        scheduler.join(*[scheduler.submit(name, name, meeting.wait) for name in STREAMS])
    assert trace.overlap("load", "low") > 0
    assert trace.overlap("low", "high") > 0


@pytest.mark.parametrize("streams", SUBSETS)
def test_folded_streams_run_on_the_callers_thread(streams: tuple[str, ...]) -> None:
    with make_scheduler("cpu", streams, threads=True) as scheduler:
        for name in STREAMS:
            done = scheduler.submit(name, name, threading.get_ident)
            scheduler.join(done)
            assert (done.value == threading.get_ident()) == (name not in streams)


def test_in_order_without_threads_everything_runs_at_once() -> None:
    ran: list[str] = []
    with make_scheduler("cpu") as scheduler:
        for name in STREAMS:
            scheduler.submit(name, name, lambda name=name: ran.append(name))
            assert ran[-1] == name


def test_misuse_is_refused() -> None:
    one, two = make_scheduler("cpu"), make_scheduler("cpu")
    done = one.submit("low", "work", lambda: 1)
    with pytest.raises(AssertionError, match="'work' belongs to another scheduler"):
        two.submit("low", "more", lambda: 1, [done])
    with pytest.raises(AssertionError, match="there is no stream 'middle'"):
        one.submit("middle", "work", lambda: 1)
    one.close()
    with pytest.raises(AssertionError, match="closed"):
        one.join(done)
    with pytest.raises(PahqError, match="streams: 'up' is unknown"):
        make_scheduler("cpu", ("up",))
    with pytest.raises(PahqError, match="no scheduler for device 'meta'"):
        make_scheduler("meta")
    with pytest.raises(PahqError, match="worker threads are for the CPU"):
        make_scheduler("cuda", threads=True)


def test_an_interrupt_is_not_kept_for_later() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with make_scheduler("cpu") as scheduler:
        with pytest.raises(KeyboardInterrupt):
            scheduler.submit("low", "work", interrupted)
        assert scheduler.here == CALLER
        scheduler.join(scheduler.submit("low", "work", int))


def test_a_bare_moment_keeps_neither_value_nor_failure() -> None:
    def fail() -> None:
        raise ValueError("no")

    with make_scheduler("cpu", threads=True) as scheduler:
        failed = scheduler.submit("low", "fails", fail)
        after = scheduler.submit("load", "copy", lambda: 5, [failed.bare()])
        scheduler.join(after)
        assert after.value == 5
        assert failed.bare().result is None


@pytest.mark.parametrize(
    ("text", "streams"),
    [("none", ()), ("load", ("load",)), ("high, load", ("load", "high")), ("load,low,high", STREAMS)],
)
def test_parse_streams(text: str, streams: tuple[str, ...]) -> None:
    assert parse_streams(text) == streams


@pytest.mark.parametrize("text", ["", "all", "load,none", "load,load", "low;high"])
def test_parse_streams_refuses(text: str) -> None:
    with pytest.raises(PahqError, match=r"^streams: "):
        parse_streams(text)


def test_tensors_of_a_value_are_found() -> None:
    @dataclass
    class Pair:
        weight: torch.Tensor
        rest: object

    a, b, c = (torch.zeros(i) for i in (1, 2, 3))
    assert [t.numel() for t in tensors({"x": [a, Pair(b, (c, 1, None, "s"))]})] == [1, 2, 3]
    assert list(tensors(3.0)) == []
    circle = Pair(a, None)
    circle.rest = [circle, np.zeros(2)]
    assert len(list(tensors(circle))) == 1

    def counter() -> Iterator[int]:
        yield 1

    with pytest.raises(AssertionError, match="gave a generator, whose tensors cannot be found"):
        list(tensors(counter()))


def test_what_a_call_captured_is_found_as_it_was() -> None:
    """The caller may rebind a name or empty a list while the device still reads what was there."""
    from functools import partial

    def outer(x: torch.Tensor, parts: list[torch.Tensor]) -> tuple[Callable[[], object], Callable[[], None]]:
        def inner() -> torch.Tensor:
            return x

        def rebind() -> None:
            nonlocal x
            x = torch.zeros(0)
            parts.clear()

        return partial(lambda y, z: (inner(), parts, y, z), torch.ones(4), z=torch.ones(5)), rebind

    call, rebind = outer(torch.ones(2), [torch.ones(3)])
    before = captured(call)
    rebind()
    sizes = {value.numel() for value in _flat(before) if isinstance(value, torch.Tensor)}
    assert sizes == {2, 3, 4, 5}

    def one(again: bool = False, kept: torch.Tensor = SIX) -> object:
        return two() if again else kept

    def two() -> object:
        return one(True)

    assert any(isinstance(value, torch.Tensor) and value.numel() == 6 for value in _flat(captured(two)))
    assert any(value is before for value in _flat(captured(before.__len__)))


def _flat(value: object) -> Iterator[object]:
    yield value
    if isinstance(value, tuple):
        for part in value:
            yield from _flat(part)
