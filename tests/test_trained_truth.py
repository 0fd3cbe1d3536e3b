"""The committed trained models do what their programs do, by their circuits alone, and need every edge of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import pahq
from pahq.engine.full import FullEvaluator, patched_logits
from pahq.evaluation.roc import auc, rates
from pahq.evaluation.truth.base import Truth, load_truth, mask_of, truth_names
from pahq.evaluation.truth.drawn import DrawnTask
from pahq.evaluation.truth.program import interchanged
from pahq.evaluation.truth.trained import HERE, PREFIX, PROGRAMS, get_program
from pahq.model import Transformer
from pahq.task.prompts import Prompts, last_position
from pahq.task.score import accuracy, read_logits

NAMES = [PREFIX + name for name in PROGRAMS]
LIMIT = 4_000_000


@cache
def case(name: str) -> tuple[Truth, Transformer, Prompts]:
    truth = load_truth(name)
    model = truth.model()
    return truth, model, truth.task().prompts(model, 100, seed=1, split="test")


def kl(clean: torch.Tensor, other: torch.Tensor) -> float:
    log_p, log_q = (torch.log_softmax(x.double(), dim=-1) for x in (clean, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_listed_and_small() -> None:
    assert set(NAMES) <= set(truth_names())
    assert sum(file.stat().st_size for file in HERE.rglob("*") if file.is_file()) < LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_truth_is_the_programs_edges(name: str) -> None:
    truth = load_truth(name)
    program = get_program(name.removeprefix(PREFIX))
    assert np.array_equal(truth.mask, mask_of(truth.graph, program.edges()))
    assert truth.facts["training"]["steps"] > 100
    assert (HERE / program.name / "losses.csv").read_text().startswith("step,")


@pytest.mark.parametrize("name", NAMES)
def test_model_and_circuit_do_the_task(name: str) -> None:
    truth, model, prompts = case(name)
    clean = read_logits(model, prompts)
    task = truth.task()
    assert task.accuracy(clean, prompts) >= 0.98
    alone = patched_logits(model, prompts, truth.graph, truth.mask)
    assert task.accuracy(alone, prompts) >= 0.95
    assert kl(clean, alone) < 0.1
    nothing = patched_logits(model, prompts, truth.graph, np.zeros_like(truth.mask))
    assert accuracy(nothing, prompts) < 0.05  # with no edge at all it says what the other prompt asks for


@pytest.mark.parametrize("name", NAMES)
def test_every_edge_of_the_circuit_is_needed_and_no_other_is(name: str) -> None:
    truth, model, prompts = case(name)
    prompts = prompts[:50]
    clean = read_logits(model, prompts)
    evaluator = FullEvaluator(model, prompts, truth.graph)

    def without(row: int, column: int) -> float:
        mask = truth.graph.edges.copy()
        mask[row, column] = False
        return kl(clean, evaluator.logits(mask))

    inside = {truth.graph.edge_name(r, c): without(r, c) for r, c in np.argwhere(truth.mask).tolist()}
    assert min(inside.values()) > 0.3, inside
    rest = np.argwhere(truth.graph.edges & ~truth.mask).tolist()
    chosen = np.random.default_rng(0).permutation(len(rest))[:100]
    outside = {truth.graph.edge_name(*rest[i]): without(*rest[i]) for i in chosen}
    assert max(outside.values()) < 0.02, max(outside, key=lambda edge: outside[edge])


@pytest.mark.parametrize("name", NAMES)
def test_interchange_of_each_edge_does_what_the_program_says(name: str) -> None:
    truth, model, _ = case(name)
    program = get_program(name.removeprefix(PREFIX))
    draw = torch.Generator().manual_seed(5)
    base, source = program.draw(200, draw), program.draw(200, draw)
    prompts = last_position(base, source, [[0]] * 200, [[1]] * 200)
    assert isinstance(truth.task(), DrawnTask)
    agreed: dict[str, float] = {}
    for edge in truth.edge_names():
        mask = truth.graph.edges.copy()
        mask[truth.graph.edge(edge)] = False
        said = patched_logits(model, prompts, truth.graph, mask)[:, 0].argmax(-1)
        target = interchanged(program, base, source, {edge: torch.ones(200, dtype=torch.bool)})
        sure = target.defined & (target.probabilities.amax(-1) == 1)
        if sure.sum() < 10:
            continue
        agreed[edge] = float((said == target.probabilities.argmax(-1))[sure].float().mean())
    # ioi: keys of another prompt seldom hold the name that comes again, so training has seen few such states
    assert min(agreed.values()) >= 0.8, agreed
    assert np.mean(list(agreed.values())) >= 0.95, agreed


@pytest.mark.parametrize(("name", "fails"), [("trained-induction", False), ("trained-induction-offset", True)])
def test_rounding_everything_fails_where_the_stream_has_a_large_mean(name: str, fails: bool) -> None:
    truth, model, _ = case(name)
    kept = {
        policy: pahq.discover(model, truth.task(), 0.1, policy=policy, n=16).mask for policy in ("rtn", "pahq-values")
    }
    assert np.array_equal(kept["pahq-values"], truth.mask)
    assert kept["rtn"].any() != fails
    if not fails:
        assert np.array_equal(kept["rtn"], truth.mask)


def test_acdc_finds_the_circuits_in_fp32_and_in_mixed_precision(capsys: pytest.CaptureFixture[str]) -> None:
    areas: list[float] = []
    for name in NAMES:
        truth, model, _ = case(name)
        points = []
        for threshold in (0.1, 0.01):
            how: dict[str, Any] = truth.options() | {"n": 16}
            fp32, mixed = (
                pahq.discover(model, truth.task(), threshold, policy=policy, **how).mask for policy in ("fp32", "pahq")
            )
            assert np.array_equal(fp32, mixed), name
            points.append(rates(fp32, truth.mask, truth.graph.edges))
        areas.append(auc(points))
    with capsys.disabled():
        print(f"\nAUC of ACDC on {len(areas)} trained models: mean {np.mean(areas):.4f}, least {min(areas):.4f}")
    assert np.mean(areas) >= 0.98
