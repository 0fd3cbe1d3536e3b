"""Figures of examples, faithfulness, CPR and CMD, intervals and random circuits, against plain computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import toys
from pahq.engine.full import patched_logits
from pahq.errors import PahqError
from pahq.evaluation import faithfulness, mib
from pahq.evaluation.baseline import random_circuit, random_circuits
from pahq.evaluation.behaviour import behaviour
from pahq.evaluation.bootstrap import Bootstrap
from pahq.evaluation.examples import Examples, Values
from pahq.graph import Graph
from pahq.method.select import connected, top
from pahq.task.metrics import METRICS
from pahq.task.prompts import Prompts
from pahq.task.score import read_logits
from tiny import RandomTask, transformer

TASK = RandomTask()
MODEL = transformer(layers=2, heads=2)
GRAPH = Graph(MODEL.config)
PROMPTS = TASK.prompts(MODEL, 5)
KEPT = GRAPH.edges & (np.random.default_rng(0).random(GRAPH.shape) < 0.7)


def ragged() -> Prompts:
    """Two positions read in some examples, one in others."""
    read = torch.tensor([[3, 5], [4, 5], [2, 0], [5, 1], [5, 0]])
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, True], [True, False]])
    ids = torch.arange(10).reshape(5, 2, 1)
    return Prompts(PROMPTS.clean, PROMPTS.corrupt, read, mask, ids, ids + 20)


@pytest.mark.parametrize("metric", [*METRICS, "l2:3"])
@pytest.mark.parametrize("prompts", [PROMPTS, ragged()], ids=["last", "ragged"])
def test_means_are_the_metrics(metric: str, prompts: Prompts) -> None:
    examples = Examples(MODEL, prompts, GRAPH, TASK, metric)
    found, plain = (
        examples.figures(KEPT),
        behaviour(MODEL, toys.circuit(GRAPH, KEPT), TASK, prompts, metric, "resample"),
    )
    assert found.metric.mean == pytest.approx(plain["circuit"]["metric"], abs=1e-6)
    assert found.accuracy is not None
    assert found.accuracy.mean == pytest.approx(plain["circuit"]["accuracy"])
    assert examples.full.metric.mean == pytest.approx(plain["full"]["metric"], abs=1e-6)
    assert examples.empty.metric.mean == pytest.approx(plain["corrupted"]["metric"], abs=1e-5)
    assert examples.measure(KEPT) == pytest.approx(found.metric.mean, abs=1e-9)
    assert examples.gap == pytest.approx(plain["full"]["metric"] - plain["corrupted"]["metric"], abs=1e-5)
    assert examples.full.kl.mean == pytest.approx(0, abs=1e-6)


def test_each_example_has_its_own_value() -> None:
    examples = Examples(MODEL, PROMPTS, GRAPH, TASK, "logit_diff")
    found = examples.figures(KEPT)
    for index in range(len(PROMPTS)):
        alone = Examples(MODEL, PROMPTS[index : index + 1], GRAPH, TASK, "logit_diff").figures(KEPT)
        one = np.array([[index]])
        assert found.metric.of(one)[0] == pytest.approx(alone.metric.mean, abs=1e-5)
        assert found.kl.of(one)[0] == pytest.approx(alone.kl.mean, abs=1e-5)
        assert found.accuracy is not None
        assert alone.accuracy is not None
        assert found.accuracy.of(one)[0] == alone.accuracy.mean


def test_long_sets_are_evaluated_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Examples(MODEL, PROMPTS, GRAPH, TASK, "kl_div", "mean").figures(KEPT)
    for module in ("pahq.evaluation.examples", "pahq.engine.full"):
        monkeypatch.setattr(f"{module}.CHUNK_BYTES", 1)
    seen = []
    examples = Examples(MODEL, PROMPTS, GRAPH, TASK, "kl_div", "mean", lambda: seen.append(1))
    pieces = examples.figures(KEPT)
    assert pieces.metric.totals == pytest.approx(whole.metric.totals, abs=1e-5)
    assert len(seen) == 2  # the empty circuit, and this one


def test_examples_without_answers_have_no_accuracy() -> None:
    none = torch.full_like(PROMPTS.answers, -1)
    bare = Prompts(PROMPTS.clean, PROMPTS.corrupt, PROMPTS.read, PROMPTS.read_mask, none, none)
    examples = Examples(MODEL, bare, GRAPH, TASK, "kl_div")
    assert examples.figures(KEPT).accuracy is None
    row = faithfulness.point(examples, KEPT, Bootstrap(5, 20))
    assert (row["accuracy"], row["accuracy_interval"]) == (None, None)
    with pytest.raises(PahqError, match="metric 'logit_diff': example 0 has no answers"):
        Examples(MODEL, bare, GRAPH, TASK, "logit_diff")


def test_recovered_by_hand() -> None:
    assert faithfulness.recovered(circuit=-3.0, empty=1.0, full=-4.0) == pytest.approx(0.8)
    assert faithfulness.recovered(-5.0, 1.0, -4.0) == pytest.approx(1.2)
    assert faithfulness.recovered(2.0, 1.0, -4.0) == pytest.approx(-0.2)
    assert faithfulness.recovered(0.5, 2.0, 0.0) == pytest.approx(1 - 0.5 / 2)  # KL divergence
    assert faithfulness.recovered(1.0, 2.0, 2.0) is None


def test_a_point_is_what_whole_passes_give() -> None:
    examples = Examples(MODEL, PROMPTS, GRAPH, TASK, "logit_diff")
    row = faithfulness.point(examples, KEPT)
    logits = patched_logits(MODEL, PROMPTS, GRAPH, KEPT)
    right, wrong = (logits.gather(-1, ids)[:, 0, 0] for ids in (PROMPTS.answers, PROMPTS.wrong))
    metric = float((wrong - right).mean())
    ends = []
    for which in ("clean", "corrupt"):
        end = read_logits(MODEL, PROMPTS, which)
        ends.append(float((end.gather(-1, PROMPTS.wrong) - end.gather(-1, PROMPTS.answers)).mean()))
    assert row["metric"] == pytest.approx(metric, abs=1e-5)
    assert row["recovered"] == pytest.approx((metric - ends[1]) / (ends[0] - ends[1]), abs=1e-4)
    assert row["accuracy"] == float((right > wrong).double().mean())
    p = torch.log_softmax(read_logits(MODEL, PROMPTS, "clean").double(), -1)
    q = torch.log_softmax(logits.double(), -1)
    assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-6)
    assert (row["edges"], row["share"]) == (KEPT.sum(), KEPT.sum() / GRAPH.n_edges)


def test_a_curve_over_sizes() -> None:
    examples = Examples(MODEL, PROMPTS, GRAPH, TASK, "kl_div")
    values = np.random.default_rng(0).random(GRAPH.shape)
    sizes = [0, 20, 40, GRAPH.n_edges]
    curve = faithfulness.curve(examples, faithfulness.series(GRAPH, values, sizes))
    assert [row["asked"] for row in curve] == sizes
    assert [row["edges"] for row in curve] == [0] + [int(top(GRAPH, values, size).sum()) for size in sizes[1:]]
    assert curve[0]["recovered"] == 0
    assert curve[-1]["recovered"] == pytest.approx(1, abs=1e-5)
    assert curve[1] == {"asked": 20} | faithfulness.point(examples, top(GRAPH, values, 20))
    with pytest.raises(PahqError, match="select: 'best' makes no circuits of given size"):
        faithfulness.series(GRAPH, values, sizes, "best")


def test_cpr_and_cmd_by_hand() -> None:
    assert mib.sizes(32491) == [32, 64, 162, 324, 649, 1624, 3249, 6498, 16245, 32491]
    assert mib.cpr([1.0] * 10) == pytest.approx(0.999)
    assert mib.cmd([1.0] * 10) == 0
    assert mib.cpr([0.0] * 10) == 0
    assert mib.cmd([0.0] * 10) == pytest.approx(0.999)
    assert mib.cpr(mib.SHARES) == pytest.approx((1 - 0.001**2) / 2)  # f(k) = k
    # three sizes: widths 0.4 and 0.5; heights 0.2, 1.2, 0.8
    shares, f = (0.1, 0.5, 1.0), [0.2, 1.2, 0.8]
    assert mib.cpr(f, shares) == pytest.approx(0.4 * 0.7 + 0.5 * 1.0)
    assert mib.cmd(f, shares) == pytest.approx(0.4 * (0.8 + 0.2) / 2 + 0.5 * 0.2)
    with pytest.raises(PahqError, match="mib: 2 values do not fit 3 circuit sizes"):
        mib.cpr([1.0, 1.0], shares)
    with pytest.raises(PahqError, match="do not grow"):
        mib.cmd([1.0, 1.0], (0.5, 0.5))


def test_cpr_on_a_toy_circuit_worked_out_by_hand() -> None:
    """Edges worth 1, 2, 3 … into the logits alone: the best k of them recover the share of their worth."""
    graph = toys.graph(layers=1, heads=2)
    names = ("m0->logits", "a0.0->logits", "a0.1->logits", "embed->logits")
    worth = dict(zip(names, (4.0, 3.0, 2.0, 1.0), strict=True))
    examples = toys.ToyExamples(
        lambda mask: -sum(value for name, value in worth.items() if mask[graph.edge(name)]), graph
    )
    masks = [(k, toys.mask(graph, *names[:k])) for k in range(5)]
    f = [row["recovered"] for row in faithfulness.curve(examples, masks)]
    assert f == pytest.approx([0, 0.4, 0.7, 0.9, 1.0])
    shares = (0.2, 0.4, 0.6, 0.8, 1.0)
    assert mib.cpr(f, shares) == pytest.approx(0.2 * (0.2 + 0.55 + 0.8 + 0.95))
    assert mib.cmd(f, shares) == pytest.approx(0.8 - 0.2 * (0.2 + 0.55 + 0.8 + 0.95))


def test_intervals_are_percentiles_of_resampled_means() -> None:
    values = Values(np.array([1.0, 2.0, 6.0, 3.0]), np.array([1.0, 2.0, 2.0, 1.0]))
    bootstrap = Bootstrap(4, samples=200, level=0.8, seed=3)
    found = bootstrap.interval(values.of)
    means = sorted(
        float(values.totals[drawn].sum()) / float(values.counts[drawn].sum()) for drawn in bootstrap.drawn.tolist()
    )
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.1, 0.9])))
    assert found.low < values.mean < found.high
    assert (found.level, found.examples, found.samples) == (0.8, 4, 200)
    assert np.array_equal(bootstrap.drawn, Bootstrap(4, 200, 0.8, 3).drawn)
    assert not np.array_equal(bootstrap.drawn, Bootstrap(4, 200, 0.8, 4).drawn)
    assert Values(np.array([-1.0, -3.0]), np.ones(2), absolute=True).mean == 2


def test_intervals_cover_what_they_should() -> None:
    """Of 200 samples of a known mean, about 90 % of the 90 % intervals hold it (somewhat fewer with 30 examples)."""
    draw, inside = np.random.default_rng(0), 0
    for seed in range(200):
        found = Bootstrap(30, 200, 0.9, seed).interval(Values(draw.normal(5, 2, 30), np.ones(30)).of)
        assert found is not None
        inside += found.low <= 5 <= found.high
    assert 0.82 <= inside / 200 <= 0.95


def test_what_makes_no_interval() -> None:
    assert Bootstrap(1).interval(Values(np.ones(1), np.ones(1)).of) is None
    assert Bootstrap(3).interval(lambda drawn: np.full(len(drawn), np.nan)) is None
    for bad, word in (({"samples": 2}, "too few"), ({"level": 1.0}, "level 1.0"), ({"examples": 0}, "no examples")):
        with pytest.raises(PahqError, match=word):
            Bootstrap(**{"examples": 3, **bad})


def test_the_interval_of_what_is_recovered_is_that_of_the_ratio() -> None:
    examples = Examples(MODEL, PROMPTS, GRAPH, TASK, "logit_diff")
    bootstrap = Bootstrap(5, 50, seed=1)
    row = faithfulness.point(examples, KEPT, bootstrap)
    m = [part.metric for part in (examples.figures(KEPT), examples.empty, examples.full)]
    ratios = [
        (a - e) / (f - e) for a, e, f in ([v.totals[drawn].mean() for v in m] for drawn in bootstrap.drawn.tolist())
    ]
    assert row["recovered_interval"]["low"] == pytest.approx(np.quantile(ratios, 0.025))
    assert row["recovered_interval"]["high"] == pytest.approx(np.quantile(ratios, 0.975))
    assert row["recovered_interval"]["examples"] == 5


@pytest.mark.parametrize("options", [{}, {"split_qkv": False}, {"direct_edges": False}, {"groups": 2}])
def test_a_random_circuit_has_the_size_asked_for_and_lives(options: dict[str, Any]) -> None:
    graph = toys.graph(layers=3, heads=4, **options)
    for size in (1, 2, 3, 10, 50, graph.n_edges // 2, graph.n_edges):
        mask = random_circuit(graph, size, np.random.default_rng(size))
        assert size - 2 <= mask.sum() <= size
        assert mask.any()
        assert np.array_equal(connected(graph, mask), mask)
        assert not (mask & ~graph.edges).any()
    with pytest.raises(PahqError, match="0 edges lie outside 1"):
        random_circuit(graph, 0, np.random.default_rng(0))
    every = np.any([random_circuit(graph, 30, np.random.default_rng(seed)) for seed in range(200)], axis=0)
    assert every.sum() > 0.9 * graph.n_edges  # no edge is out of reach


def test_random_circuits_beside_a_circuit() -> None:
    graph, seen = toys.graph(layers=3, heads=4), []

    def measure(mask: np.ndarray) -> float:
        seen.append(mask)
        return float(mask.sum())

    examples = toys.ToyExamples(measure, graph)
    seen.clear()
    found = random_circuits(examples, 100, count=4, seed=7)
    masks = seen[::2]
    assert len(masks) == 4
    for mask in masks:
        assert mask.sum() == 100
    assert len({mask.tobytes() for mask in masks}) == 4
    sizes = [float(mask.sum()) for mask in masks]
    assert found["mean"]["metric"] == pytest.approx(np.mean(sizes))
    assert found["std"]["metric"] == pytest.approx(np.std(sizes, ddof=1))
    assert [row["seed"] for row in found["rows"]] == [7, 8, 9, 10]
    assert random_circuits(examples, 100, count=1, seed=8)["rows"] == found["rows"][1:2]
    assert random_circuits(examples, 100, count=1)["std"]["metric"] is None
    with pytest.raises(PahqError, match="0 are too few"):
        random_circuits(examples, 100, count=0)
