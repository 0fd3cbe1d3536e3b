"""Signal and noise of one edge: passes against the oracle's and the engine's, exactness under FP32, and the figures."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from pahq.engine import Batch, Engine
from pahq.engine.full import patched_logits
from pahq.errors import PahqError
from pahq.evaluation.precision import passes
from pahq.evaluation.precision.edges import edge_effects, full_marks, strong_edge
from pahq.evaluation.precision.passes import removal
from pahq.evaluation.precision.snr import Snr, decibels, heads_under_test, measure_snr, variants
from pahq.graph import Graph
from pahq.precision.policy import FP32, Policy, get_policy
from pahq.precision.store import WeightStore
from pahq.precision.values import rounded_model
from pahq.task.metrics import LogitsReadout, get_metric
from random_models import Case, cases, drawn


def an_edge(case: Case, seed: int) -> tuple[int, int]:
    edges = np.argwhere(case.graph.edges[:, : case.graph.direct])
    row, column = edges[seed % len(edges)].tolist()
    return row, column


def plain(case: Case) -> Graph:
    """The graph that these studies use."""
    return Graph(case.model.config)


@drawn(60)
@given(case=cases(), seed=st.integers(0, 10**6))
def test_fp32_pass_is_the_patched_model(case: Case, seed: int) -> None:
    case.graph = plain(case)
    edge = an_edge(case, seed)
    found = removal(case.model, case.prompts, case.graph, edge, case.ablation, FP32)
    mask = case.graph.edges.copy()
    full = patched_logits(case.model, case.prompts, case.graph, mask, case.ablation)
    torch.testing.assert_close(found.full_read.logits()[0], full, rtol=0, atol=1e-9)
    mask[edge] = False
    cut = patched_logits(case.model, case.prompts, case.graph, mask, case.ablation)
    torch.testing.assert_close(found.cut_read.logits()[0], cut, rtol=0, atol=1e-9)


@drawn(60)
@given(case=cases(torch.float32), seed=st.integers(0, 10**6))
def test_exact_products_of_differences_are_the_patched_model(case: Case, seed: int) -> None:
    """With FP32 in place of the low-precision matrices only the way of adding up is left to differ."""
    case.graph = plain(case)
    edge = an_edge(case, seed)
    exact = removal(case.model, case.prompts, case.graph, edge, case.ablation, FP32)
    heads = frozenset((la, h) for la in range(case.model.config.n_layers) for h in range(case.model.config.n_heads))
    policy = replace(get_policy("attention=e4m3"), heads=heads)  # low in name, every head in FP32
    assert policy.differences
    found = removal(case.model, case.prompts, case.graph, edge, case.ablation, policy)
    for point, stream in exact.cut.items():
        scale = float(stream.abs().max()) + 1
        torch.testing.assert_close(found.cut[point], stream, rtol=0, atol=2e-5 * scale)
    torch.testing.assert_close(
        found.cut_read.logits()[0],
        exact.cut_read.logits()[0],
        rtol=0,
        atol=1e-4 * (1 + float(exact.cut_read.logits()[0].abs().max())),
    )


@pytest.mark.parametrize("under_test", ["none", "sender", "receiver", "both"])
@pytest.mark.parametrize("metric", ["kl_div", "logit_diff"])
@pytest.mark.parametrize("name", ["a0.0->a1.0.v", "a1.2->a2.0.k", "m0->a2.2.v", "embed->m1", "a2.0->logits"])
def test_differences_are_the_engine_s(name: str, under_test: str, metric: str) -> None:
    """The same edge and policy in the engine: its effect has the same error, not just the same size."""
    model = tiny.transformer(4, 4)
    prompts = tiny.RandomTask().prompts(model, 6)
    graph = Graph(model.config)
    edge = graph.edge(name)
    policy = get_policy("attention=e5m2,mlp=int8,unembed=bf16", under_test)
    engine = Engine(model, prompts, graph, metric, screen=False, policy=policy)
    batch = Batch([edge], np.ones((1, 1), dtype=bool), full_marks(graph))
    effect = float(engine.evaluate(batch)[0][0]) - engine.base_metric
    found = measure_snr(model, prompts, metric, "resample", policy, name)
    exact = found.effects["fp32"]
    assert len({row["variant"] for row in found.rows}) == len(variants(policy))
    ours = list(found.effects.values())[1]
    assert abs(ours - effect) <= 0.1 * abs(exact - effect) + 1e-6 * max(1, abs(engine.base_metric))


def test_values_are_the_rounded_model_s() -> None:
    model = tiny.transformer(3, 4)
    prompts = tiny.RandomTask().prompts(model, 3)
    policy = get_policy("rtn")
    found = removal(model, prompts, Graph(model.config), (0, 0), "resample", policy)
    computes = rounded_model(model, policy, WeightStore(model, policy))
    assert torch.equal(found.full["final"], computes.residual(prompts.clean))
    assert torch.equal(found.full_read.logits()[0], computes.forward(prompts.clean)[:, -1:])


def measured(policy: Policy | str, edge: str | None = "a0.0->a1.0.v", metric: str = "kl_div") -> Snr:
    model = tiny.transformer(5, 4)
    prompts = tiny.RandomTask().prompts(model, 6)
    return measure_snr(model, prompts, metric, "resample", get_policy(policy), edge)


def test_no_noise_without_low_precision() -> None:
    found = measured("fp32")
    assert {row["snr_db"] for row in found.rows} == {math.inf} == {row["snr_db_read"] for row in found.rows}
    assert all(row["signal"] > 0 and row["noise"] == 0 for row in found.rows)
    # what lies before the edge carries no signal and is left out
    assert [row["point"] for row in found.rows] == ["m1", "a2", "m2", "a3", "m3", "a4", "m4", "final"]


def test_signal_falls_and_differences_keep_more_of_it() -> None:
    found = measured("pahq")
    by = {
        (quantised, under): [
            row["snr_db"] for row in found.rows if (row["quantised"], row["under_test"]) == (quantised, under)
        ]
        for quantised in ("differences", "values")
        for under in ("both", "none")
    }
    assert len(found.rows) == 4 * 8
    assert all(math.isfinite(value) for some in by.values() for value in some)
    for under in ("both", "none"):
        assert min(by["differences", under]) > max(by["values", under]) - 10
        assert by["differences", under][-1] > by["values", under][-1] + 10
    # a head in FP32 starts clean and is then worn down; in low precision there is noise from the start
    assert by["differences", "both"][0] > by["differences", "none"][0] + 20
    assert by["differences", "both"][0] > by["differences", "both"][-1] + 20


def test_noise_is_what_is_left_of_the_signal() -> None:
    """The figures again, from the streams themselves."""
    model = tiny.transformer(3, 4)
    prompts = tiny.RandomTask().prompts(model, 4)
    graph = Graph(model.config)
    edge = graph.edge("a0.1->m1")
    policy = get_policy("int8-values")
    exact, low = (removal(model, prompts, graph, edge, "resample", one) for one in (FP32, policy))
    found = measure_snr(model, prompts, "kl_div", "resample", policy, "a0.1->m1")
    for row in (row for row in found.rows if (row["quantised"], row["under_test"]) == ("values", "none")):
        point = row["point"]
        signal = (exact.cut[point] - exact.full[point]).double()
        noise = (low.cut[point] - low.full[point]).double() - signal
        assert row["signal"] == pytest.approx(float(signal.square().mean().sqrt()), rel=1e-5)
        assert row["noise"] == pytest.approx(float(noise.square().mean().sqrt()), rel=1e-4)
        ratio = float(signal[:, -1].norm() / noise[:, -1].norm())
        assert row["snr_db_read"] == pytest.approx(20 * math.log10(ratio), abs=1e-3)


def test_effects_are_of_the_metric_asked_for() -> None:
    found = measured("pahq", metric="logit_diff")
    model = tiny.transformer(5, 4)
    prompts, graph = tiny.RandomTask().prompts(model, 6), Graph(model.config)
    mask = graph.edges.copy()
    mask[graph.edge(found.edge)] = False
    logits = [patched_logits(model, prompts, graph, m) for m in (graph.edges, mask)]
    measure = get_metric("logit_diff", prompts, logits[0])
    expected = [float(measure(LogitsReadout(value))[0]) for value in logits]
    assert found.effects["fp32"] == pytest.approx(expected[1] - expected[0], abs=1e-6)


def test_a_strong_edge_is_early_and_strong() -> None:
    model = tiny.transformer(6, 4)
    prompts, graph = tiny.RandomTask().prompts(model, 4), Graph(model.config)
    engine = Engine(model, prompts, graph, screen=False)
    edge, why = strong_edge(engine)
    receiver, sender = graph.receivers[edge[0]], graph.senders[edge[1]]
    assert receiver.is_attention
    assert receiver.layer <= 3
    assert sender.kind == "head"
    assert "between heads" in why
    rng = np.random.default_rng(0)
    early = [(r, c) for r, c in np.argwhere(graph.edges[:, : graph.direct]).tolist() if graph.receivers[r].layer <= 3]
    others = [early[i] for i in rng.choice(len(early), 60)]
    sizes = np.abs(edge_effects(engine, [edge, *others]))
    assert sizes[0] >= np.median(sizes)


def test_heads_under_test() -> None:
    graph = Graph(tiny.transformer(3, 4).config)
    edge = graph.edge("a0.2->a2.3.k")
    expected = {"none": set(), "sender": {(0, 2)}, "receiver": {(2, 3)}, "both": {(0, 2), (2, 3)}}
    for under_test, heads in expected.items():
        assert heads_under_test(graph, edge, get_policy("e4m3", under_test)) == heads
    assert heads_under_test(graph, graph.edge("m0->logits"), get_policy("pahq")) == set()


def test_variants_cover_values_and_differences_once() -> None:
    found = [(p.quantised, p.under_test) for p in variants(get_policy("pahq"))]
    assert found == [("differences", "both"), ("differences", "none"), ("values", "both"), ("values", "none")]
    found = variants(get_policy("pahq-values", "sender"))
    assert found[0].under_test == "sender"
    assert len(found) == 5
    assert all(set(p.formats) <= set("qkvo") | {"mlp", "unembed"} for p in found if p.quantised == "differences")
    assert variants(FP32) == [FP32]
    assert [p.quantised for p in variants(get_policy("values:norm=bf16"))] == ["values", "values"]


def test_decibels() -> None:
    assert decibels(10, 1) == pytest.approx(20)
    assert decibels(1, 0) == decibels(0, 0) == math.inf
    assert decibels(0, 1) == -math.inf


def test_edges_that_cannot_be() -> None:
    for edge, message in (
        ("direct->a1.0.q", "is a direct one"),
        ("a1.0->a0.0.q", "does not exist"),
        ("a0.0", "does not exist"),
    ):
        with pytest.raises(PahqError, match=message):
            measured("pahq", edge)


def test_overflow_is_one_line() -> None:
    model = tiny.transformer(3, 4)
    big = replace(model, W_E=model.W_E * 1e5)
    prompts = tiny.RandomTask().prompts(model, 2)
    policy = get_policy("values:embed=e4m3-overflow")
    with pytest.raises(PahqError, match="nan"):
        measure_snr(big, prompts, "kl_div", "resample", policy, "a0.0->a1.0.v")


def test_points_are_in_order_of_computation() -> None:
    model = tiny.transformer(2, 2)
    prompts = tiny.RandomTask().prompts(model, 2)
    found = removal(model, prompts, Graph(model.config), (0, 0), "zero", get_policy("bf16"))
    assert list(found.full) == list(found.cut) == ["a0", "m0", "a1", "m1", "final"]
    assert isinstance(found, passes.Removal)
