"""Samples of sweeps replayed, agreement, bytes, and the recommended table."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given

import tiny
from pahq.engine import Engine
from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.evaluation.precision.agreement import agreement, ranks, spearman
from pahq.evaluation.precision.replay import WINDOW, replay, sweep, sweep_of, windows
from pahq.evaluation.precision.sensitivity import (
    Sensitivity,
    Watcher,
    budget_bytes,
    measure_sensitivity,
    recommend,
    single_policies,
)
from pahq.graph import Graph
from pahq.method.acdc import Acdc, AcdcOptions, Progress
from pahq.model.config import ModelConfig
from pahq.model.transformer import Transformer, build
from pahq.precision.policy import FP32, KINDS, POLICIES, get_policy
from pahq.precision.size import head_bytes, table_bytes, weight_bytes
from pahq.precision.store import WeightStore
from pahq.task.prompts import Prompts
from random_models import Case, cases, drawn, random_weights

THRESHOLD = 0.002


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny.transformer(3, 4)


@pytest.fixture(scope="module")
def prompts(model: Transformer) -> Prompts:
    return tiny.RandomTask().prompts(model, 4)


@drawn(25)
@given(case=cases())
def test_replayed_effects_are_those_of_the_sweep(case: Case) -> None:
    """In FP64, from whatever base the windows start: the whole sweep, and a sample of it."""
    options = AcdcOptions(0.01, case.metric, case.ablation, head_order=case.head_order, sender_order=case.sender_order)
    result = Acdc(case.model, case.prompts, options).run()
    decisions = sweep(case.model, case.prompts, options)
    assert sweep_of(Circuit(result.graph, result.mask, result.effects, result.order)) == decisions
    graph = Graph(case.model.config)
    expected = {(d.row, d.column): d.effect for d in result.decisions}
    for tests in (len(decisions), 20, 3):
        sample = windows(graph, options, decisions, tests)
        edges = [edge for window in sample for edge in window.batch.candidates]
        assert len(edges) == len(set(edges)) <= tests
        assert len(edges) >= min(tests, len(decisions)) - WINDOW + 1
        engine = Engine(case.model, case.prompts, graph, case.metric, case.ablation, screen=False)
        effects = replay(engine, sample)
        scale = max(1.0, *(abs(d.before) for d in result.decisions))
        np.testing.assert_allclose(effects, [expected[edge] for edge in edges], rtol=0, atol=1e-8 * scale)


def test_samples_spread_over_the_sweep(model: Transformer, prompts: Prompts) -> None:
    options = AcdcOptions(THRESHOLD)
    decisions = sweep(model, prompts, options)
    assert len(decisions) > 100
    place = {(row, column): order for order, (row, column, _) in enumerate(decisions)}
    sample = windows(Graph(model.config), options, decisions, 64)
    starts = [place[window.batch.candidates[0]] for window in sample]
    assert len(starts) == 4
    assert (starts[0], starts[-1]) == (0, len(decisions) - WINDOW)
    assert max(np.diff(starts)) - min(np.diff(starts)) <= 1
    assert windows(Graph(model.config), options, [], 64) == []
    with pytest.raises(PahqError, match="test 1 of it is not what these options ask for"):
        windows(Graph(model.config), options, decisions[1:], 64)


@pytest.fixture(scope="module")
def found(model: Transformer, prompts: Prompts) -> Sensitivity:
    return measure_sensitivity(
        model, prompts, AcdcOptions(THRESHOLD), formats=("fp32", "bf16", "e5m2"), quantised="both", budget="0.5x"
    )


def test_fp32_agrees_with_itself(found: Sensitivity) -> None:
    rows = [row for row in found.rows if row["format"] == "fp32"]
    assert len(rows) == 6 + len(KINDS)
    for row in rows:
        assert (row["decisions"], row["spearman"]) == (1.0, pytest.approx(1.0))
        assert row["error_median"] == row["error_99"] == row["error_rms"] == 0.0


def test_coarser_formats_err_more(found: Sensitivity) -> None:
    by = {(row["kind"], row["format"], row["quantised"]): row for row in found.rows}
    assert len(by) == 3 * (6 + len(KINDS))
    for kind in KINDS:
        fine, coarse = (by[kind, name, "values"] for name in ("bf16", "e5m2"))
        assert 0 < fine["error_rms"] < coarse["error_rms"]
        assert coarse["bytes"] <= fine["bytes"] <= found.fp32_bytes
        assert coarse["seconds"] > 0
    # what the method is about: the same format does less harm to differences than to values
    for kind in ("mlp", "o", "unembed"):
        assert by[kind, "e5m2", "differences"]["error_rms"] < by[kind, "e5m2", "values"]["error_rms"]
    assert found.tests <= found.sweep_tests


def test_recommendations_fit_and_are_measured(found: Sensitivity, model: Transformer) -> None:
    assert [choice.quantised for choice in found.choices] == ["differences", "values"]
    for choice in found.choices:
        assert choice.bytes <= choice.budget == found.fp32_bytes // 2
        assert choice.bytes == table_bytes(model, choice.formats, choice.quantised)
        assert choice.measured["decisions"] > 0.9
        # independent errors: a rough prediction, but of the right size
        assert choice.predicted / 10 < choice.measured["error_rms"] < choice.predicted * 10


def test_recommended_is_near_the_best_table(found: Sensitivity, model: Transformer) -> None:
    """Against all tables of a few kinds: the least predicted error that fits, or close to it."""
    kinds, formats = ("v", "o", "mlp", "unembed"), ("fp32", "bf16", "e5m2")
    rows = [row for row in found.rows if row["quantised"] == "values" and row["kind"] in kinds]
    error = {(row["kind"], row["format"]): row["error_rms"] ** 2 for row in rows}
    whole = table_bytes(model, {}, "values")
    least = table_bytes(model, dict.fromkeys(kinds, "e5m2"), "values") / whole
    for share in (0.99, 0.95, 0.75 + least / 4, 0.5 + least / 2, 1e-6 + least):
        best = np.inf
        for choice in itertools.product(formats, repeat=len(kinds)):
            table = dict(zip(kinds, choice, strict=True))
            if table_bytes(model, table, "values") <= share * whole:
                best = min(best, sum(error[item] for item in table.items()))
        table, predicted = recommend(model, rows, "values", int(share * whole))
        assert table_bytes(model, table, "values") <= share * whole
        assert best**0.5 <= predicted * (1 + 1e-9)
        assert predicted <= 1.5 * best**0.5
    assert recommend(model, rows, "values", whole) == ({}, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["heads"]}, "component 'heads' is unknown"),
        ({"formats": ["fp4"]}, "format 'fp4' is unknown"),
        ({"formats": []}, "name at least one of each"),
        ({"kinds": []}, "name at least one of each"),
        ({"quantised": "all"}, "quantised 'all' is unknown"),
        ({"tests": 0}, "tests: 0 are too few"),
        ({"budget": "little"}, "budget 'little' is no size"),
        ({"budget": "-1x"}, "budget '-1x' is no size"),
        ({"budget": "infx"}, "budget 'infx' is no size"),
        ({"budget": "nan"}, "budget 'nan' is no size"),
        ({"budget": "0.1x"}, "are fewer than the"),
        ({"budget": "0.5x", "kinds": ["q"]}, "are fewer than the"),
        ({"formats": ["tf32"]}, "tf32"),
    ],
)
def test_bad_options_are_told_before_the_sweep(
    model: Transformer, prompts: Prompts, options: dict, message: str
) -> None:
    class Never(Watcher):
        def sweep(self, progress: Progress) -> None:
            raise AssertionError("the sweep began")

    with pytest.raises(PahqError, match=message):
        measure_sensitivity(model, prompts, AcdcOptions(THRESHOLD), watcher=Never(), **options)


def test_budgets() -> None:
    assert budget_bytes("0.4x", 1000) == 400
    assert budget_bytes("120e6", 1000) == 120_000_000


def test_what_is_no_product_is_rounded_as_values() -> None:
    names = [policy.name for policy in single_policies(["q", "norm"], ["bf16"], "differences")]
    assert names == ["differences:q=bf16", "values:norm=bf16"]
    assert len(single_policies(None, ["bf16"], "both")) == 6 + len(KINDS)
    assert len(single_policies(["q", "q"], ["bf16", "bf16"], "values")) == 1


def test_ranks_and_spearman() -> None:
    values = np.array([3.0, 1.0, 3.0, -2.0, 7.0])
    assert ranks(values).tolist() == [2.5, 1.0, 2.5, 0.0, 4.0]
    rng = np.random.default_rng(0)
    a = rng.integers(0, 6, 40).astype(float)
    slow = [float(np.mean([i for i, v in enumerate(sorted(a)) if v == x])) for x in a]
    assert ranks(a).tolist() == slow
    assert spearman(a, np.exp(a)) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    assert spearman(a, np.ones(40)) is None
    assert spearman(a[:1], a[:1]) is None


def test_agreement_counts_decisions() -> None:
    low, fp32 = np.array([0.0, 2.0, 1.0, -5.0]), np.array([0.5, 2.0, 0.9, -5.0])
    figures = agreement(low, fp32, 1.0)
    assert figures["decisions"] == 0.75  # 1.0 stays, 0.9 goes: strictly below
    assert figures["error_median"] == pytest.approx(0.05)
    assert figures["error_rms"] == pytest.approx(((0.25 + 0.01) / 4) ** 0.5)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "fp32"])
def test_bytes_are_those_of_the_copies(name: str) -> None:
    cfg = ModelConfig(2, 4, 2, 24, 6, 40, 30, 30, 8, gated=True, act="silu", norm="rms")
    model = build(cfg, random_weights(cfg, 0, set(), torch.float32))
    policy = get_policy(name)
    store = WeightStore(model, policy)
    store.make_all()
    store.matrix("unembed")
    held = {entry.component: entry.nbytes for entry in store.held()}
    sizes = weight_bytes(model, policy)
    assert {kind: sizes[kind] for kind in held} == held
    assert ("embed" in sizes) == policy.values
    assert sum(weight_bytes(model, FP32).values()) == sum(weight.nbytes for weight in model.weights.values())


def test_one_tensor_counts_once() -> None:
    tied = tiny.transformer(2, 2)
    weights = dict(tied.weights)
    weights["unembed.W_U"] = weights["embed.W_E"].T
    tied = build(tied.config, weights)
    whole = sum(weight.nbytes for weight in tied.weights.values())
    assert sum(weight_bytes(tied, FP32).values()) == whole - tied.W_E.nbytes
    assert sum(weight_bytes(tied, get_policy("values:q=fp32")).values()) == whole - tied.W_E.nbytes
    assert tied.W_pos is not None
    apart = weight_bytes(tied, get_policy("values:unembed=bf16"))
    assert (apart["embed"], apart["unembed"]) == (tied.W_E.nbytes + tied.W_pos.nbytes, tied.W_E.nbytes // 2)


def test_bytes_of_heads_count_shared_keys_once() -> None:
    cfg = ModelConfig(2, 4, 2, 24, 6, 40, 30, 30, 8)
    model = build(cfg, random_weights(cfg, 0, set(), torch.float32))
    matrix = 24 * 6 * 4
    assert head_bytes(model, []) == 0
    assert head_bytes(model, [(0, 0)]) == 4 * matrix
    assert head_bytes(model, [(0, 0), (0, 1)]) == 6 * matrix
    assert head_bytes(model, [(0, 0), (1, 0), (0, 0)]) == 8 * matrix


@pytest.mark.parametrize(("kinds", "share"), [(None, 0.5), (["q"], None)])
def test_the_budget_is_half_unless_that_cannot_be(
    model: Transformer, prompts: Prompts, kinds: list[str] | None, share: float | None
) -> None:
    found = measure_sensitivity(model, prompts, AcdcOptions(THRESHOLD), kinds=kinds, formats=("e5m2",), tests=8)
    (choice,) = found.choices
    least = table_bytes(model, {"q": "e5m2"}, "differences")
    assert choice.budget == (found.fp32_bytes // 2 if share else least)
    assert choice.bytes <= choice.budget
