"""Information-flow routes against a twin that walks over single positions of single examples."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from kept_work import Kept, Killed
from pahq.engine.reference import run
from pahq.errors import PahqError
from pahq.graph import Graph, Sender
from pahq.method.base import Problem
from pahq.method.information_flow import InformationFlowOptions, information_flow_scores
from pahq.model.config import ModelConfig
from pahq.model.transformer import Transformer, build
from pahq.precision.policy import get_policy
from pahq.task.prompts import Prompts, last_position
from random_models import Case, cases, drawn, random_weights

Place = tuple[str, int]
"""A receiver (``<a0.1.q``) or sender (``a0.1>``) at a position."""
COMBINE = ("bottleneck", "flow", "local")
CFG = ModelConfig(3, 4, 2, 12, 4, 16, 20, 20, 8, gated=True, act="silu", norm="rms", positions="rotary", rotary_dim=4)


def shares(parts: dict[Any, np.ndarray], whole: np.ndarray, tau: float) -> dict[Any, float]:
    near = {name: max(0.0, np.abs(whole).sum() - np.abs(whole - part).sum()) for name, part in parts.items()}
    if not any(near.values()):
        near = {name: np.abs(part).sum() for name, part in parts.items()}
    total = sum(near.values())
    out = {name: value / total if total else 0.0 for name, value in near.items()}
    return {name: value if value > tau else 0.0 for name, value in out.items()}


class Twin:
    """One example: every edge between single positions by itself, followed by recursion from the prediction."""

    def __init__(self, model: Transformer, prompts: Prompts, graph: Graph, combine: str, tau: float) -> None:
        self.graph, self.combine, self.cfg = graph, combine, model.config
        self.length = int((~prompts.pad).sum()) if prompts.pad is not None else prompts.clean.shape[1]
        cfg, tokens = self.cfg, prompts.clean[:, : self.length]
        clean = run(model, tokens, graph.split_pos)
        written: dict[str, np.ndarray] = {}  # sender -> [T, d]
        inside: dict[tuple[int, int, int], dict[int, float]] = {}  # layer, head, position -> share of each position
        eye = torch.eye(self.length, dtype=model.dtype).expand(1, cfg.n_kv_heads, -1, -1)
        for sender in graph.senders:
            value = clean.sender(sender)[0]
            if sender.kind == "head":
                attn, group = model.blocks[sender.layer].attn, sender.index // cfg.group_size
                pattern = model.attend(clean.q[sender.layer], clean.k[sender.layer], eye)[0, sender.index]
                terms = (clean.v[sender.layer][0, group] @ attn.W_O[sender.index]).numpy()
                value = value @ attn.W_O[sender.index]
                for t in range(self.length):
                    parts = {j: float(pattern[t, j]) * terms[j] for j in range(self.length)}
                    inside[sender.layer, sender.index, t] = shares(parts, value[t].numpy(), tau)
            written[sender.name] = value.numpy()
        # what a place passes its own level on to, and by how much
        self.passes: defaultdict[Place, list[tuple[Place, float]]] = defaultdict(list)
        self.consumers: defaultdict[Place, list[tuple[Place, float]]] = defaultdict(list)
        self.share: dict[tuple[int, int, int], float] = {}
        third = 1 / 3 if combine == "flow" else 1.0
        for row, receiver in enumerate(graph.receivers):
            stream = clean.receiver(receiver)[0]
            upstream = graph.senders[: graph.n_upstream(receiver)]
            for t in range(self.length):
                found = shares({s.name: written[s.name][t] for s in upstream}, stream[t].numpy(), tau)
                for column, sender in enumerate(upstream):
                    self.share[row, column, t] = found[sender.name]
                    self.consumers[f"{sender.name}>", t].append(((f"<{receiver.name}", t), found[sender.name]))
                here = f"<{receiver.name}", t
                if receiver.kind == "mlp":
                    self.consumers[here].append(((f"{receiver.name}>", t), 1.0))
                if not receiver.is_attention:
                    continue
                for head in graph.heads_of(receiver):
                    name = f"a{receiver.layer}.{head}>"
                    if receiver.kind in ("q", "qkv"):
                        self.consumers[here].append(((name, t), third))
                    for times in {"k": 1, "v": 1, "qkv": 2, "q": 0}[receiver.kind] * [third]:
                        for i in range(self.length):
                            self.consumers[here].append(((name, i), times * inside[receiver.layer, head, i][t]))
        counts = Counter(
            t for t, read in zip(prompts.read[0].tolist(), prompts.read_mask[0].tolist(), strict=True) if read
        )
        self.start = {
            ("<logits", t): count / counts.total() if combine != "bottleneck" else 1.0 for t, count in counts.items()
        }
        self.known: dict[Place, float] = {}

    def level(self, place: Place) -> float:
        """What reaches a place from the prediction."""
        if place[0] == "<logits":
            return self.start.get(place, 0.0)
        if place not in self.known:
            found = [(self.level(consumer), by) for consumer, by in self.consumers[place]]
            if self.combine == "flow":
                self.known[place] = sum(level * by for level, by in found)
            else:
                self.known[place] = max((min(level, by) for level, by in found), default=0.0)
        return self.known[place]

    def scores(self) -> np.ndarray:
        out, graph, positions = np.zeros(self.graph.shape), self.graph, range(self.length)
        for row, receiver in enumerate(graph.receivers):
            for column in range(graph.n_upstream(receiver)):
                each = [self.share[row, column, t] for t in positions]
                if self.combine == "local":
                    weights = [
                        self.start.get(("<logits", t), 0.0) if row == len(out) - 1 else 1 / self.length
                        for t in positions
                    ]
                    out[row, column] = np.dot(each, weights)
                    continue
                levels = [self.level((f"<{receiver.name}", t)) for t in positions]
                if self.combine == "flow":
                    out[row, column] = np.dot(each, levels)
                else:
                    out[row, column] = max(map(min, each, levels))
            if graph.edges[row, graph.direct] and self.combine != "local":
                levels = [self.level((f"<{receiver.name}", t)) for t in positions]
                out[row, graph.direct] = sum(levels) if self.combine == "flow" else max(levels)
        return out


def twin(problem: Problem, combine: str, tau: float) -> np.ndarray:
    graph, prompts = problem.graph, problem.prompts
    out = sum(Twin(problem.model, prompts[i : i + 1], graph, combine, tau).scores() for i in range(len(prompts)))
    assert isinstance(out, np.ndarray)
    out /= len(prompts)
    if combine == "local" and graph.direct_edges:
        for row, receiver in enumerate(graph.receivers):
            if receiver.is_attention:
                heads = [graph.sender_index[Sender("head", receiver.layer, h)] for h in graph.heads_of(receiver)]
                out[row, graph.direct] = out[:, heads].max()
    return out


def test_equals_the_twin_on_every_architecture() -> None:
    features: Counter[str] = Counter()

    @drawn(45)
    @given(case=cases())
    def check(case: Case) -> None:
        combine, tau = COMBINE[case.seed % 3], (0.0, 0.05, 0.2)[case.seed // 3 % 3]
        problem = Problem(case.model, case.prompts, case.graph, memory_limit=(1 << 30, 20_000)[case.seed // 9 % 2])
        options = InformationFlowOptions(combine, tau)
        found = information_flow_scores(problem, options)
        np.testing.assert_allclose(found.values, twin(problem, combine, tau), rtol=1e-9, atol=1e-12)
        assert (found.values[~case.graph.edges] == 0).all()
        assert found.values.max() <= 1 + 1e-12
        features[combine] += 1
        features[f"tau {tau}"] += 1
        features[f"parallel {case.model.config.parallel}"] += 1
        features[f"groups {case.model.config.group_size > 1}"] += 1
        features[f"joint {not case.graph.split_qkv}"] += 1
        features[f"padded {case.prompts.pad is not None}"] += 1

    check()
    assert len(features) == 3 + 3 + 4 * 2, sorted(features)


def grouped(seed: int = 0, n: int = 3, **options: Any) -> Problem:
    model = build(CFG, random_weights(CFG, seed, set()))
    tokens = torch.randint(20, (n, 6), generator=torch.Generator().manual_seed(seed))
    prompts = last_position(tokens, tokens.flip(0), [[0]] * n, [[1]] * n)
    return Problem(model, prompts, Graph(CFG), **options)


def test_what_flows_from_the_prediction_arrives_at_the_embeddings() -> None:
    """Shares sum to one and heads divide what reaches them, so nothing is lost on the way and nothing is added."""
    problem = grouped()
    scores = information_flow_scores(problem, InformationFlowOptions("flow"))
    graph, values = problem.graph, scores.values
    addition = values[:, : graph.direct]
    assert addition[-1].sum() == pytest.approx(1)
    assert addition[:, 0].sum() == pytest.approx(1)  # embed
    for row, receiver in enumerate(graph.receivers):
        if receiver.is_attention:
            assert values[row, graph.direct] == pytest.approx(addition[row].sum())
    for column, sender in enumerate(graph.senders[1:], start=1):  # what reaches a node, its inputs pass on
        inputs = [r for r in graph.receivers if r.layer == sender.layer and r.is_attention]
        heads = [graph.sender_index[Sender("head", sender.layer, h)] for h in range(CFG.n_heads)]
        if sender.kind == "mlp":
            row = next(i for i, r in enumerate(graph.receivers) if r.kind == "mlp" and r.layer == sender.layer)
            assert addition[row].sum() == pytest.approx(addition[:, column].sum())
        else:
            rows = [graph.receiver_index[r] for r in inputs]
            assert addition[rows].sum() == pytest.approx(addition[:, heads].sum())


def test_a_threshold_cuts_the_scores_that_are_below_it() -> None:
    """An edge's bottleneck is the largest threshold at which routes hold it."""
    problem = grouped(n=1)
    free = information_flow_scores(problem, InformationFlowOptions("bottleneck")).values
    for tau in (0.02, 0.1, 0.3):
        cut = information_flow_scores(problem, InformationFlowOptions("bottleneck", tau))
        np.testing.assert_allclose(cut.values, np.where(free > tau, free, 0), rtol=1e-12)
        assert cut.natural == tau


def test_a_sender_that_is_all_of_a_stream_has_all_of_its_share() -> None:
    """With everything but one head silent at the end, the logits read nothing but that head."""
    weights = random_weights(CFG, 0, {"b_out", "b_O"})
    weights["embed.W_E"] *= 1e-9
    for layer in range(CFG.n_layers):
        weights[f"blocks.{layer}.mlp.W_out"] *= 0
        keep = torch.zeros(CFG.n_heads, 1, 1, dtype=torch.float64)
        keep[2] = float(layer == 1)
        weights[f"blocks.{layer}.attn.W_O"] *= keep
    problem = grouped()
    problem = Problem(build(CFG, weights), problem.prompts, problem.graph)
    scores = information_flow_scores(problem, InformationFlowOptions("bottleneck")).values
    row, column = problem.graph.edge("a1.2->logits")
    assert scores[row, column] == pytest.approx(1, abs=1e-6)
    assert scores[row].sum() == pytest.approx(1, abs=1e-6)


def test_pieces_and_kills_change_nothing() -> None:
    problem = grouped(n=5)
    whole = information_flow_scores(problem, InformationFlowOptions()).values
    small = grouped(n=5, memory_limit=1)
    work = Kept()
    apart = information_flow_scores(small, InformationFlowOptions(), work)
    np.testing.assert_allclose(apart.values, whole, rtol=1e-12)
    assert work.saves == 5
    assert work.told[-1] == (15, 15)
    assert [done for done, _ in work.told] == sorted(done for done, _ in work.told)
    for kill_after in range(1, 6):
        killed = Kept(kill_after)
        with pytest.raises(Killed):
            information_flow_scores(small, InformationFlowOptions(), killed)
        again = information_flow_scores(small, InformationFlowOptions(), killed)
        assert np.array_equal(again.values, apart.values)  # bit for bit
        assert killed.saves == 5


def test_policies_round_the_clean_run_where_they_round_values() -> None:
    model = build(CFG, random_weights(CFG, 0, set(), torch.float32))
    base = grouped()

    def scores(policy: str) -> Any:
        return information_flow_scores(
            Problem(model, base.prompts, base.graph, policy=get_policy(policy)), InformationFlowOptions()
        )

    plain = scores("fp32")
    assert np.array_equal(scores("int8").values, plain.values)
    assert any("'int8' quantises differences" in note for note in scores("int8").notes)
    change = [np.abs(scores(name).values - plain.values).max() for name in ("bf16-values", "int8-values", "rtn")]
    assert 0 < change[0] < 0.05
    assert change[2] > change[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "best"}, "information-flow: combine 'best' is unknown; choose one of flow, bottleneck, local"),
        ({"tau": 1.0}, "information-flow: tau is 1.0; it must be at least 0 and below 1"),
        ({"tau": float("nan")}, "information-flow: tau is nan; it must be at least 0 and below 1"),
        ({"tau": "x"}, "information-flow: tau is x; it must be at least 0 and below 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PahqError) as error:
        InformationFlowOptions(**options)
    assert str(error.value) == message
