"""The published code's defects (Wang et al. 2025), each checked for here and each put back to see the check fail.

1. Head 0's patched input is read for every head. 2. A transposed matrix is taken as row-major. 3. The FP32 head is
not switched while queries, keys and values are swept. 4. Casts to FP8 have no scales, products come out in FP8.
5. The KL divergence is measured from the low-precision model's own output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pahq.engine import Batch, Engine, Marks
from pahq.engine.arithmetic import Arithmetic
from pahq.engine.batch import BatchPass
from pahq.engine.marks import head_column
from pahq.graph import Graph, Receiver
from pahq.model.config import ModelConfig
from pahq.model.transformer import Transformer, build
from pahq.precision import formats, matrix
from pahq.precision.formats import FORMATS, Rounded, dequantise, quantise, round_to
from pahq.precision.matrix import LowMatrix, low_matrix
from pahq.precision.policy import POLICIES, get_policy
from pahq.task.prompts import Prompts, last_position
from random_models import random_weights

LOW = [name for name in POLICIES if name != "fp32"]
CFG = ModelConfig(2, 4, 4, 24, 6, 32, 40, 40, 8)


def random_model(seed: int = 0, cfg: ModelConfig = CFG) -> Transformer:
    return build(cfg, random_weights(cfg, seed, set(), torch.float32))


def random_prompts(count: int = 4, length: int = 5, seed: int = 1) -> Prompts:
    draw = torch.Generator().manual_seed(seed)
    clean, corrupt = (torch.randint(40, (count, length), generator=draw) for _ in range(2))
    return last_position(clean, corrupt, [[1]] * count, [[2]] * count)


def finished(graph: Graph, layer: int) -> Marks:
    """All edges present; every receiver from ``layer`` on counts as decided, so that its inputs may change."""
    marks = Marks.full(graph)
    for row in reversed(range(len(graph.receivers))):
        if graph.receivers[row].layer >= layer:
            marks.finish(row)
    return marks


def single(engine: Engine, edges: list[tuple[int, int]]) -> Batch:
    """One state an edge, each without that edge alone."""
    layer = min(engine.graph.receivers[row].layer for row, _ in edges)
    marks = finished(engine.graph, layer)
    return Batch(edges, np.eye(len(edges), dtype=bool), marks)


def effects(engine: Engine, edges: list[tuple[int, int]]) -> np.ndarray:
    return engine.evaluate(single(engine, edges))[0] - engine.base_metric


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    first, second = (torch.tensor(values).argsort().argsort().double() for values in (a, b))
    return float(torch.corrcoef(torch.stack((first, second)))[0, 1])


# --- 1: every head reads its own input -----------------------------------------------------------------------


def edges_into(graph: Graph, layer: int, kind: str, head: int) -> list[tuple[int, int]]:
    row = graph.receiver_index[Receiver(kind, layer, head)]  # type: ignore[arg-type]  # q, k or v
    return [(row, column) for column in range(graph.n_upstream(graph.receivers[row]))]


def heads_changed(engine: Engine, edge: tuple[int, int]) -> set[int]:
    """The heads of the edge's layer whose output differs without the edge."""
    layer = engine.graph.receivers[edge[0]].layer
    batch = single(engine, [edge])
    engine.evaluate(batch)
    assert engine._now is not None
    found = set()
    for head in range(engine.graph.config.n_heads):
        column = head_column(engine.graph, layer, head)
        stored = engine._now.rows.rows.get(("out", column, 0))
        base = engine.state.output(column, batch.marks.sender_reach(column))
        if stored is not None and float((stored[1][0] - base).abs().max()) > 1e-5:
            found.add(head)
    return found


@pytest.mark.parametrize("policy", ["fp32", *LOW])
@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_1_an_edge_into_head_3_changes_head_3_and_no_other(policy: str, kind: str) -> None:
    engine = Engine(random_model(), random_prompts(), Graph(CFG), policy=policy)
    for head in (3, 0, 2):
        row = engine.graph.receiver_index[Receiver(kind, 1, head)]  # type: ignore[arg-type]  # q, k or v
        assert heads_changed(engine, (row, 0)) == {head}


CORRELATED = ModelConfig(4, 16, 16, 24, 6, 32, 40, 40, 8)


def varied_model() -> Transformer:
    """Heads of very different strength below layer 2, as trained models have them; FP8 above and below it."""
    weights = random_weights(CORRELATED, 3, set(), torch.float32)
    draw = torch.Generator().manual_seed(5)
    for layer in range(CORRELATED.n_layers):
        values = torch.randn(16, 6, 24, generator=draw) / 2.5
        if layer < 2:
            values *= torch.exp(2.3 * torch.randn(16, 1, 1, generator=draw)) / 4
        weights[f"blocks.{layer}.attn.W_O"] = values
    return build(CORRELATED, weights)


def correlations(policy: str, heads: range) -> dict[tuple[str, int], float]:
    """Spearman's correlation with FP32's effects, of the edges into each head's query, key and value."""
    model, prompts, graph = varied_model(), random_prompts(64, seed=2), Graph(CORRELATED)
    low, fp32 = (Engine(model, prompts, graph, "logit_diff", policy=name) for name in (policy, "fp32"))
    found = {}
    for kind in "qkv":
        for head in heads:
            edges = edges_into(graph, 2, kind, head)
            found[kind, head] = spearman(effects(low, edges), effects(fp32, edges))
    return found


def test_1_effects_correlate_on_edges_into_every_head() -> None:
    found = correlations("pahq", range(16))
    assert len(found) == 48
    assert min(found.values()) >= 0.99, min(found.items(), key=lambda item: item[1])


def test_1_the_defect_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head 0's input for every head: other heads' edges then have no effect at all."""
    inputs = BatchPass._inputs

    def of_head_0(self: BatchPass, step: Any) -> Any:
        receiver = self.graph.receivers[step.row]
        for states, x in inputs(self, step):
            if receiver.is_attention and receiver.index and self.maths.chained:
                base = self.state.input(step.row, step.level)
                yield states, base.expand_as(x).clone()
            else:
                yield states, x

    monkeypatch.setattr(BatchPass, "_inputs", of_head_0)
    engine = Engine(random_model(), random_prompts(), Graph(CFG), policy="pahq")
    row = engine.graph.receiver_index[Receiver("q", 1, 3)]
    assert heads_changed(engine, (row, 0)) != {3}
    found = correlations("pahq", range(3))
    assert found["q", 0] >= 0.99
    assert not found["q", 1] >= 0.99
    assert not found["v", 2] >= 0.99


# --- 2: x @ W, square or not ---------------------------------------------------------------------------------


def products_right(size: tuple[int, int], name: str) -> bool:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(20, size[0], generator=draw), torch.randn(*size, generator=draw)
    try:
        error = (low_matrix(weight, name).multiply(x) - x @ weight).norm() / (x @ weight).norm()
    except RuntimeError:
        return False  # the sizes do not even fit
    return float(error) < 0.1


@pytest.mark.parametrize("name", ["bf16", "e4m3", "e5m2", "int8"])
@pytest.mark.parametrize("size", [(32, 32), (32, 48), (48, 32)], ids=str)
def test_2_products_are_not_transposed(size: tuple[int, int], name: str) -> None:
    assert products_right(size, name)


@pytest.mark.parametrize("size", [(32, 32), (32, 48)], ids=str)
def test_2_the_defect_is_found(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def row_major(x: Tensor, w: Tensor) -> Tensor:
        return formats.expand(x) @ formats.expand(w)

    monkeypatch.setattr(matrix, "_fp8_product", row_major)
    assert not products_right(size, "e4m3")


# --- 3: the head under test is FP32, for every state that tests it and no other ------------------------------


class Watched:
    """Notes which states compute each product in FP32: (what, layer, head or group) -> states."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.exact = engine, {}
        self.all: dict[tuple[str, int, int], set[int]] = {}

    def run(self, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
        found, seen = self.exact, self.all

        def watch(name: str, method: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
            def watched(maths: Arithmetic, one: int, other: int, *rest: int) -> np.ndarray:
                under = method(maths, one, other, *rest)
                if name == "row":
                    receiver, first = maths.graph.receivers[one], other
                    key = (receiver.kind, receiver.layer, receiver.index)
                else:
                    key, first = ("o", one, other), rest[0]
                found[key] = {first + i for i in np.flatnonzero(under)}
                seen[key] = {first + i for i in range(len(under))}
                return under

            return watched

        with monkeypatch.context() as patch:
            patch.setattr(Arithmetic, "under_test", watch("row", Arithmetic.under_test))
            patch.setattr(Arithmetic, "head_under_test", watch("head", Arithmetic.head_under_test))
            self.engine.evaluate(batch)


def swept(engine: Engine) -> Batch:
    """States that test two edges of the q, k and v of each head of the last layer, and each MLP's."""
    graph = engine.graph
    last = graph.config.n_layers - 1
    edges = [(row, column) for row, r in enumerate(graph.receivers) if r.layer == last for column in (0, 1)]
    return single(engine, edges)


def under_test_right(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether q, k, v and o of a head are FP32 in the states that test it, and low in all others."""
    batch, watched = swept(engine), Watched(engine)
    watched.run(batch, monkeypatch)
    graph, last = engine.graph, engine.graph.config.n_layers - 1
    right = True
    for head in range(graph.config.n_heads):
        testing: set[int] = set()
        for kind in ("q", "k", "v"):
            row = graph.receiver_index[Receiver(kind, last, head)]
            states = {state for state in range(batch.n_states) if batch.tested_rows[state] == row}
            right &= watched.exact[kind, last, head] == states
            testing |= states
        right &= watched.exact["o", last, head] == testing & watched.all["o", last, head]
        right &= testing <= watched.all["o", last, head]
        right &= len(testing) == 6
    return right & (not watched.exact["mlp", last, 0])


@pytest.mark.parametrize("policy", ["pahq", "pahq-values"])
@pytest.mark.parametrize("under", ["receiver", "both"])
def test_3_q_k_v_and_o_of_the_head_under_test_are_fp32(
    policy: str, under: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(random_model(), random_prompts(), Graph(CFG), policy=get_policy(policy, under))
    assert under_test_right(engine, monkeypatch)


@pytest.mark.parametrize("policy", ["pahq", "pahq-values"])
def test_3_the_defect_is_found(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The FP32 head stays the one that was first tested."""

    def begin(self: Arithmetic, tested: np.ndarray, spine: np.ndarray) -> None:
        real(self, np.full_like(tested, tested[0]), spine)

    real = Arithmetic.begin
    monkeypatch.setattr(Arithmetic, "begin", begin)
    engine = Engine(random_model(), random_prompts(), Graph(CFG), policy=policy)
    assert not under_test_right(engine, monkeypatch)


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_3_its_values_are_fp32s(kind: str) -> None:
    """Query, key or value of the head under test come out as in FP32; with nothing under test they do not."""
    model, prompts, graph = random_model(), random_prompts(), Graph(CFG)
    row = graph.receiver_index[Receiver(kind, 1, 3)]  # type: ignore[arg-type]  # q, k or v
    found = {}
    for name, under in (("fp32", None), ("pahq", "both"), ("pahq", "sender")):
        engine = Engine(model, prompts, graph, policy=get_policy(name, under))
        engine.evaluate(single(engine, [(row, 0)]))
        assert engine._now is not None
        found[name, under] = engine._now.rows.rows[kind, 1, 3][1]
    right = found["fp32", None]
    assert float((found["pahq", "both"] - right).abs().max()) < 1e-5
    assert float((found["pahq", "sender"] - right).abs().max()) > 1e-3


# --- 4: FP8 with scales, products in FP32 --------------------------------------------------------------------


def keeps_digits(name: str) -> bool:
    """Whether numbers of any size keep their digits, alone and in products."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(8, 32, generator=draw), torch.randn(32, 48, generator=draw)
    right = True
    for size in (1e-12, 1e-6, 1e-3, 1.0, 1e4, 1e9):
        rounded = round_to(x * size, FORMATS[name])
        right &= float(((rounded / size - x) / x.abs().amax(-1, keepdim=True)).abs().max()) < 0.0626  # half a step
        for out in (low_matrix(weight, name).multiply(x * size), low_matrix(weight * size, name).multiply(x)):
            right &= float((out / size - x @ weight).norm() / (x @ weight).norm()) < 0.06
    return right


def test_4_e4m3_is_scaled() -> None:
    assert keeps_digits("e4m3")


def test_4_the_defect_is_found() -> None:
    assert not keeps_digits("e4m3-unscaled")


def fine_steps(multiply: Callable[[LowMatrix, Tensor], Tensor]) -> bool:
    """Whether products come out as float32 numbers between which e4m3 could not tell."""
    draw = torch.Generator().manual_seed(0)
    out = multiply(low_matrix(torch.randn(32, 48, generator=draw), "e4m3"), torch.randn(8, 32, generator=draw))
    return out.dtype == torch.float32 and not torch.equal(out, out.to(torch.float8_e4m3fn).float())


def test_4_products_are_not_e4m3() -> None:
    assert fine_steps(LowMatrix.multiply)
    assert not fine_steps(lambda low, x: low.multiply(x).to(torch.float8_e4m3fn).float())


def test_4_dequantise_gives_float32() -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    for name in ("e4m3", "e5m2", "int8", "bf16", "e4m3-unscaled"):
        assert dequantise(quantise(x, FORMATS[name]), FORMATS[name]).dtype == torch.float32
    codes = Rounded(x.to(torch.float8_e4m3fn), None)
    assert dequantise(codes, FORMATS["e4m3"]).dtype == torch.float32


# --- 5: the reference of KL is FP32's output -----------------------------------------------------------------


def reference_right(engine: Engine, model: Transformer, prompts: Prompts) -> bool:
    """Whether the metric's reference is the FP32 model's output, bit for bit."""
    logits = model.forward(prompts.clean)[torch.arange(len(prompts))[:, None], prompts.read]
    p = torch.log_softmax(logits.double(), -1).exp()
    return torch.equal(engine.metric.p, p)  # type: ignore[attr-defined]  # of the KL divergence


@pytest.mark.parametrize("policy", ["fp32", *LOW])
def test_5_the_reference_is_fp32s(policy: str) -> None:
    model, prompts = random_model(), random_prompts()
    engine = Engine(model, prompts, Graph(CFG), "kl_div", policy=policy)
    assert reference_right(engine, model, prompts)
    if get_policy(policy).values:
        assert engine.base_metric > 1e-6  # the low-precision model's distance from it, no edge removed
    else:
        assert abs(engine.base_metric) < 1e-6  # the base state is FP32's own


def test_5_the_defect_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from pahq.engine import setup as module

    real = module.get_metric
    model, prompts = random_model(), random_prompts()

    def own(name: str, prompts: Prompts, clean_logits: Tensor) -> Any:
        policy = get_policy("pahq-values")
        low = module.rounded_model(model, policy, module.WeightStore(model, policy))
        return real(name, prompts, low.forward(prompts.clean)[torch.arange(len(prompts))[:, None], prompts.read])

    monkeypatch.setattr(module, "get_metric", own)
    engine = Engine(model, prompts, Graph(CFG), "kl_div", policy="pahq-values")
    assert not reference_right(engine, model, prompts)
    assert abs(engine.base_metric) < 1e-6
