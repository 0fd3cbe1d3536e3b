"""The package's full-forward evaluator against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given

import oracle
from pahq.engine import full
from pahq.engine.engine import Engine
from pahq.engine.full import FullEvaluator, patched_logits
from pahq.engine.reference import reference_run
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.model.config import ModelConfig
from pahq.model.transformer import build
from pahq.task.prompts import Prompts, last_position
from pahq.task.score import read_logits
from random_models import Case, cases, drawn, random_weights


def at_read(logits: torch.Tensor, case: Case) -> torch.Tensor:
    return logits[torch.arange(len(case.prompts))[:, None], case.prompts.read]


@drawn(80)
@given(case=cases())
def test_patched_logits_agree_with_oracle(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    graph = case.graph
    mask = graph.edges & (rng.random(graph.shape) < rng.choice([0.1, 0.5, 0.9]))
    visited = rng.random(len(graph.receivers)) < rng.choice([0.5, 1.0])
    for seen in (visited, None):
        rows = np.flatnonzero(np.ones(len(graph.receivers)) if seen is None else seen)
        chosen = {graph.receivers[row] for row in rows}
        expected = oracle.circuit_logits(case.model, case.prompts, graph, mask, case.ablation, chosen)
        ours = patched_logits(case.model, case.prompts, graph, mask, case.ablation, seen)
        torch.testing.assert_close(ours, at_read(expected, case), rtol=0, atol=1e-10)


@drawn(80)
@given(case=cases())
def test_whole_mask_is_the_clean_model_and_empty_mask_the_reference(case: Case) -> None:
    graph, model, prompts = case.graph, case.model, case.prompts
    ours = patched_logits(model, prompts, graph, graph.edges.copy(), case.ablation)
    torch.testing.assert_close(ours, at_read(model.forward(prompts.clean), case), rtol=0, atol=1e-9)
    if case.ablation == "resample" and not graph.split_pos:
        ours = patched_logits(model, prompts, graph, np.zeros(graph.shape, dtype=bool), case.ablation)
        torch.testing.assert_close(ours, at_read(model.forward(prompts.corrupt), case), rtol=0, atol=1e-10)


@drawn(80)
@given(case=cases())
def test_pieces_and_a_shared_reference_change_nothing(case: Case) -> None:
    graph, rng = case.graph, np.random.default_rng(case.seed)
    mask = graph.edges & (rng.random(graph.shape) < 0.5)
    whole = patched_logits(case.model, case.prompts, graph, mask, case.ablation)
    reference = reference_run(case.model, case.prompts, case.ablation, graph.split_pos)
    shared = FullEvaluator(case.model, case.prompts, graph, case.ablation, reference).logits(mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full, "CHUNK_BYTES", 1)
        pieces = patched_logits(case.model, case.prompts, graph, mask, case.ablation)
    torch.testing.assert_close(shared, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-10)


@drawn(60)
@given(case=cases())
def test_layers_that_nothing_visited_reaches_may_be_skipped(case: Case) -> None:
    graph, rng = case.graph, np.random.default_rng(case.seed)
    whole, later = (FullEvaluator(case.model, case.prompts, graph, case.ablation) for _ in range(2))
    for layer in rng.permutation(case.model.config.n_layers + 1).tolist():
        visited = np.array([receiver.layer >= layer for receiver in graph.receivers])
        kept = (rng.random(graph.shape) < 0.5) | ~visited[:, None]
        mask = graph.edges & kept
        expected = whole.logits(mask, visited)
        torch.testing.assert_close(later.logits(mask, visited, layer), expected, rtol=0, atol=1e-10)


def test_mask_of_another_graph_is_refused() -> None:
    cfg = ModelConfig(1, 2, 2, 6, 3, 0, 9, 9, 5, norm="none")
    model = build(cfg, random_weights(cfg, 0, set()))
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    prompts = last_position(tokens, tokens, [[0]], [[1]])
    joint = Graph(cfg, split_qkv=False)
    with pytest.raises(PahqError, match=r"mask: its shape \[7, 4\] does not fit the \[3, 4\]"):
        patched_logits(model, prompts, joint, Graph(cfg).edges)


def test_padding_that_would_be_seen_is_refused_wherever_a_model_runs() -> None:
    tokens = torch.ones(2, 3, dtype=torch.int64)
    pad = torch.tensor([[False, False, False], [False, False, True]])
    even = last_position(tokens, tokens, [[0], [0]], [[1], [1]])
    padded = replace(even, read=torch.tensor([[2], [1]]), pad=pad)
    for causal in (True, False):
        cfg = ModelConfig(1, 2, 2, 6, 3, 0, 9, 9, 5, norm="none", causal=causal)
        model, graph = build(cfg, random_weights(cfg, 0, set())), Graph(cfg)
        doors: list[Callable[[Prompts], object]] = [
            lambda given, model=model: read_logits(model, given),
            lambda given, model=model, graph=graph: patched_logits(model, given, graph, graph.edges),
            lambda given, model=model, graph=graph: FullEvaluator(model, given, graph),
            lambda given, model=model, graph=graph: Engine(model, given, graph),
        ]
        for door in doors:
            door(even)
            door(replace(even, pad=torch.zeros_like(pad)))
            if causal:
                door(padded)
                continue
            with pytest.raises(PahqError, match="padding needs causal attention"):
                door(padded)
