"""Traces: what is written, and how much two streams overlap."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pahq.errors import PahqError
from pahq.precision.schedule import make_scheduler
from pahq.precision.trace import Trace
from pahq.report.tracing import open_scheduler
from random_models import drawn

SPANS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40), st.integers(0, 10)), max_size=20)


@drawn(100)
@given(spans=SPANS)
def test_overlap_counts_the_moments_when_both_are_busy(spans: list[tuple[str, int, int]]) -> None:
    trace, busy = Trace(), {"a": set[int](), "b": set[int]()}
    for stream, begin, length in spans:
        trace.add("work", stream, begin, begin + length)
        busy[stream] |= set(range(begin, begin + length))
    assert trace.overlap("a", "b") == trace.overlap("b", "a") == pytest.approx(len(busy["a"] & busy["b"]) / 1e9)
    assert trace.busy("a") == pytest.approx(len(busy["a"]) / 1e9)


def test_file_shows_a_row_a_stream(tmp_path: Path) -> None:
    trace = Trace()
    with make_scheduler("cpu", ("load",), trace=trace) as scheduler:
        done = scheduler.submit("load", "weights of a1.2", lambda: 1)
        scheduler.join(scheduler.submit("high", "head a1.2", lambda: done.value, [done]))
    trace.write(tmp_path / "trace.json")
    written = json.loads((tmp_path / "trace.json").read_text())
    rows = {e["tid"]: e["args"]["name"] for e in written["traceEvents"] if e["name"] == "thread_name"}
    work = [event for event in written["traceEvents"] if event["ph"] == "X"]
    assert [(event["name"], rows[event["tid"]]) for event in work] == [
        ("weights of a1.2", "load"),
        ("head a1.2", "high"),
    ]
    assert work[0]["ts"] == 0
    assert work[0]["ts"] + work[0]["dur"] <= work[1]["ts"]
    assert work[1]["args"] == {"folded": True}
    assert set(rows.values()) == {"load", "low", "high"}
    assert written["otherData"] == {"spans": 2, "dropped": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_times_are_microseconds(tmp_path: Path) -> None:
    trace = Trace()
    trace.add("a", "low", 5_000, 7_500)
    trace.add("b", "other", 6_000, 6_001)
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [(e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [(0.0, 2.5), (1.0, 0.001)]
    assert any(e["args"].get("name") == "other" for e in events)


def test_memory_is_bounded_and_the_file_says_so(tmp_path: Path) -> None:
    trace = Trace(limit=3)
    for index in range(5):
        trace.add("work", "low", index, index + 1)
    trace.write(tmp_path / "trace.json")
    notes = json.loads((tmp_path / "trace.json").read_text())["otherData"]
    assert (notes["spans"], notes["dropped"]) == (3, 2)
    assert "only the first 3 spans" in notes["note"]


def test_an_empty_trace_and_a_bad_path(tmp_path: Path) -> None:
    Trace().write(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"]["spans"] == 0
    with pytest.raises(PahqError, match="no such file or folder"):
        Trace().write(tmp_path / "nowhere" / "trace.json")


def test_streams_of_a_traced_run_work_together_on_a_cpu_too() -> None:
    ready = Event()
    with open_scheduler(torch.device("cpu"), None, traced=True) or make_scheduler("cpu") as scheduler:
        waits = scheduler.submit("low", "waits", lambda: ready.wait(60))
        frees = scheduler.submit("high", "frees", ready.set)
        scheduler.join(waits, frees)
        assert waits.value
        assert scheduler.trace is not None
    assert {span.name for span in scheduler.trace.spans()} == {"waits", "frees"}
