"""The oracle against what can be known without it: the plain forward pass, the package's metrics, small circuits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import oracle
from pahq.graph import Graph, Receiver
from pahq.model.config import ModelConfig
from pahq.model.transformer import build
from pahq.task.metrics import get_metric
from pahq.task.prompts import last_position
from random_models import METRICS, Case, cases, drawn, random_weights


@drawn(80)
@given(case=cases())
def test_plain_forward_of_oracle_and_model_agree(case: Case) -> None:
    for tokens in (case.prompts.clean, case.prompts.corrupt):
        expected = oracle.forward(case.model, case.graph, tokens).logits
        torch.testing.assert_close(case.model.forward(tokens), expected, rtol=0, atol=1e-10)


class AllLogits:
    """A ``Readout`` of logits [S, N, P, V] that are simply there."""

    def __init__(self, logits: Tensor) -> None:
        self.all = logits

    def select(self, ids: Tensor) -> Tensor:
        return self.all.gather(-1, ids.clamp(min=0).expand(len(self.all), *ids.shape))

    def expect(self, probabilities: Tensor) -> Tensor:
        return (self.all * probabilities).sum(-1)

    def logsumexp(self) -> Tensor:
        return torch.logsumexp(self.all, dim=-1)

    def logits(self) -> Tensor:
        return self.all


@drawn(40)
@given(case=cases())
def test_metrics_of_oracle_and_package_agree(case: Case) -> None:
    prompts = case.prompts
    clean, *states = (case.model.forward(t) for t in (prompts.clean, prompts.corrupt, prompts.clean))
    rows = torch.arange(len(prompts))[:, None]
    at_read = torch.stack([logits[rows, prompts.read] for logits in states])
    for name in METRICS:
        expected = [oracle.metric_value(name, logits, clean, prompts) for logits in states]
        metric = get_metric(name, prompts, clean[rows, prompts.read])
        torch.testing.assert_close(metric(AllLogits(at_read)).tolist(), expected, rtol=1e-12, atol=1e-12)


def test_metrics_by_hand() -> None:
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    prompts = last_position(tokens, tokens, [[0]], [[1, 2]])
    now, clean = torch.tensor([[[0.5, 0.2, 0.3]]]).log(), torch.tensor([[[0.8, 0.1, 0.1]]]).log()
    log = np.log
    expected = {
        "kl_div": 0.8 * log(0.8 / 0.5) + 0.1 * log(0.1 / 0.2) + 0.1 * log(0.1 / 0.3),
        "logit_diff": -(log(0.5) - (log(0.2) + log(0.3)) / 2),
        "docstring": -(log(0.5) - log(0.3)),
        "greaterthan": -(0.5 - 0.5),
        "nll": -log(0.5),
        "match_nll": log(0.8) - log(0.5),
        "l2": (log(0.5 / 0.8) ** 2 + log(0.2 / 0.1) ** 2 + log(0.3 / 0.1) ** 2) / 3,
        "l2:1,2": (log(0.2 / 0.1) ** 2 + log(0.3 / 0.1) ** 2) / 2,
    }
    for name, value in expected.items():
        assert oracle.metric_value(name, now, clean, prompts) == pytest.approx(value, abs=1e-6), name


CONFIG = ModelConfig(2, 2, 2, 6, 3, 5, 9, 9, 5)


def graph_and_rows() -> tuple[Graph, dict[str, int], dict[str, int]]:
    graph = Graph(CONFIG)
    return graph, {r.name: i for i, r in enumerate(graph.receivers)}, {s.name: i for i, s in enumerate(graph.senders)}


def test_a_receiver_dies_with_its_last_path() -> None:
    graph, row, column = graph_and_rows()
    mask = np.zeros(graph.shape, dtype=bool)
    mask[row["logits"], column["m1"]] = True
    mask[row["m1"], column["a0.1"]] = True
    mask[[row["a0.1.q"], row["a0.1.k"]], graph.direct] = True
    alive = {
        (name, edge)
        for name in row
        for edge in ("direct", "addition")
        if oracle.reaches_output(graph, mask, graph.receivers[row[name]], edge)
    }
    # the head lives, and its v too, but v's input went with the direct edge
    inputs = {("logits", "addition"), ("m1", "addition"), ("a0.1.q", "addition"), ("a0.1.k", "addition")}
    assert {pair for pair in alive if pair[1] == "addition"} == inputs
    assert {name for name, edge in alive if edge == "direct" and ".1." in name} == {"a0.1.q", "a0.1.k", "a0.1.v"}
    assert not any(name.startswith(("a1", "a0.0")) for name, _ in alive)


def test_order_of_visits_and_of_senders() -> None:
    graph, row, _ = graph_and_rows()
    visits = [f"{r}{'!' if edge == 'direct' else ''}" for r, edge in oracle.visits(graph)]
    assert visits[:8] == ["logits", "m1", "a1.1.v!", "a1.0.v!", "a1.1.k!", "a1.0.k!", "a1.1.q!", "a1.0.q!"]
    assert visits[8:15] == ["a1.1.v", "a1.0.v", "a1.1.k", "a1.0.k", "a1.1.q", "a1.0.q", "m0"]
    split = Graph(CONFIG, split_pos=True)

    def senders(*orders: str) -> list[str]:
        return [split.senders[c].name for c in oracle.sender_order(split, Receiver("logits", 2), *orders)]

    assert senders("descending", "latest") == ["m1", "a1.1", "a1.0", "m0", "a0.1", "a0.0", "embed", "pos_embed"]
    assert senders("ascending", "latest") == ["m1", "a1.0", "a1.1", "m0", "a0.0", "a0.1", "embed", "pos_embed"]
    assert senders("descending", "earliest") == ["pos_embed", "embed", "a0.1", "a0.0", "m0", "a1.1", "a1.0", "m1"]
    assert len(visits) == len(row) + 12


def test_sweep_bookkeeping() -> None:
    model = build(CONFIG, random_weights(CONFIG, 3, set()))
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = (torch.randint(9, (4, 4), generator=generator) for _ in range(2))
    prompts = last_position(clean, corrupt, [[0]] * 4, [[1]] * 4)
    graph = Graph(CONFIG)
    sweep = oracle.acdc(model, prompts, graph, threshold=0.05)
    tested = sweep.order >= 0
    assert [d.order for d in sweep.decisions] == sorted(sweep.order[tested].tolist()) == list(range(tested.sum()))
    assert np.array_equal(np.isnan(sweep.effects), ~tested)
    assert np.array_equal(sweep.mask[tested], sweep.effects[tested] >= 0.05)  # signed and strict
    assert not sweep.mask[~tested].any()
    assert 0 < sweep.mask.sum() < tested.sum() < graph.n_edges
    everything = set(graph.receivers)
    final = oracle.circuit_logits(model, prompts, graph, sweep.mask, "resample", everything)
    value = oracle.metric_value("kl_div", final, model.forward(clean), prompts)
    assert sweep.metric == pytest.approx(value, abs=1e-12)
