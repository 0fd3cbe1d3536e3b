"""Policies that round values: the rounded model's parts against their definition, the engine against whole passes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import oracle
from pahq.engine import Batch, Engine, Marks
from pahq.engine.marks import head_column, mlp_column
from pahq.engine.reference import Run, reference_run, run
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.model.config import ModelConfig
from pahq.model.transformer import Transformer, build
from pahq.precision import values
from pahq.precision.formats import FORMATS, get_format, round_to
from pahq.precision.policy import Policy, get_policy
from pahq.precision.store import WeightStore
from pahq.precision.values import RoundedTransformer, rounded_model
from pahq.task.prompts import Prompts, last_position
from random_models import Case, cases, drawn, random_weights

VALUES = ("bf16-values", "pahq-values", "int8-values", "rtn", "values:q=e5m2,mlp=int8,norm=bf16,residual=bf16")
CFG = ModelConfig(2, 4, 2, 24, 6, 32, 40, 40, 8, gated=True, act="silu", norm="rms")


def rounded(model: Transformer, policy: Policy) -> RoundedTransformer:
    return rounded_model(model, policy, WeightStore(model, policy))


def grouped_model() -> Transformer:
    return build(CFG, random_weights(CFG, 0, set(), torch.float32))


# --- the rounded model's parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VALUES)
def test_products_of_rounded_rows_and_weights(name: str) -> None:
    model, policy = grouped_model(), get_policy(name)
    low, draw = rounded(model, policy), torch.Generator().manual_seed(0)
    x, z = torch.randn(7, 24, generator=draw), torch.randn(7, 6, generator=draw)

    def product(rows: Tensor, weight: Tensor, kind: str) -> Tensor:
        fmt = policy.format(kind)
        return round_to(rows, fmt).double() @ round_to(weight.T.contiguous(), fmt).T.double()

    def check(ours: Tensor, expected: Tensor, kind: str) -> None:
        room = 1e-5 if policy.format(kind).name in ("fp32", "int8") else 2.0**-8
        torch.testing.assert_close(ours.double(), expected, rtol=room, atol=1e-5)

    for layer, block in enumerate(model.blocks):
        here = low.blocks[layer]
        for which, weights, biases in (
            ("q", block.attn.W_Q, block.attn.b_Q),
            ("k", block.attn.W_K, block.attn.b_K),
            ("v", block.attn.W_V, block.attn.b_V),
        ):
            assert biases is not None
            for index, weight in enumerate(weights):
                check(here.attn.project(x, which, index) - biases[index], product(x, weight, which), which)
        for head, weight in enumerate(block.attn.W_O):
            check(here.attn.write(z, head), product(z, weight, "o"), "o")
        assert block.mlp is not None
        assert here.mlp is not None
        hidden, gate = here.mlp.hidden(x)
        assert gate is not None
        assert block.mlp.W_gate is not None
        b = [0.0 if bias is None else bias for bias in (block.mlp.b_in, block.mlp.b_gate)]
        check(hidden - b[0], product(x, block.mlp.W_in, "mlp"), "mlp")
        check(gate - b[1], product(x, block.mlp.W_gate, "mlp"), "mlp")


@pytest.mark.parametrize("name", VALUES)
def test_what_else_is_rounded(name: str) -> None:
    model, policy = grouped_model(), get_policy(name)
    low, x = rounded(model, policy), torch.randn(5, 24, generator=torch.Generator().manual_seed(0))

    def holds(value: Tensor, kind: str) -> bool:
        return torch.equal(round_to(value, policy.format(kind)), value)

    assert torch.equal(low.embed_tokens(torch.arange(40)), round_to(model.W_E, policy.format("embed")))
    assert holds(low.blocks[0].ln1(x), "norm")
    assert holds(low.add(x, x.flip(0)), "residual")
    assert holds(low.pattern(x), "softmax")
    assert holds(low.unembed_input(x), "unembed")
    assert holds(low.logits(x), "metric")
    assert policy.format("norm").is_exact or not torch.equal(low.blocks[0].ln1(x), model.blocks[0].ln1(x))


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("slab", [7, 1000])
def test_the_unembedding_is_what_its_format_keeps(name: str, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "SLAB", slab)
    model, policy = grouped_model(), get_policy(name)
    low, wanted = rounded(model, policy), round_to(model.W_U.T, policy.format("unembed"))
    pieces = list(low.unembedding())
    assert [part.stop - part.start for part, _ in pieces] == [piece.shape[1] for _, piece in pieces]
    assert torch.equal(torch.cat([piece for _, piece in pieces], dim=1), wanted.T)
    tokens = torch.tensor([[3, 39], [0, 3]])
    assert torch.equal(low.columns(tokens), wanted[tokens])
    h = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(low.times_unembedding(h), h @ wanted.T)


@pytest.mark.parametrize("name", VALUES)
def test_rounding_depends_on_a_row_alone(name: str) -> None:
    """So the same input gives the same codes, whatever other states are computed with it."""
    low = rounded(grouped_model(), get_policy(name))
    draw = torch.Generator().manual_seed(0)
    x, others = torch.randn(3, 24, generator=draw), 100 * torch.randn(9, 24, generator=draw)
    matrix = low.blocks[0].attn.matrices["q"][0]  # type: ignore[attr-defined]  # of the rounded attention
    alone, among = matrix.encode(x), matrix.encode(torch.cat((others, x)))
    assert torch.equal(alone.values.float(), among.values[9:].float())
    assert alone.scale is None or torch.equal(alone.scale, among.scale[9:])


def test_additions_are_lost_without_scales() -> None:
    """Why RTN fails: an addend whose exponent is far below vanishes, and so do small differences."""
    low = rounded(grouped_model(), get_policy("rtn"))
    assert low.add(torch.ones(1, 4), torch.full((1, 4), 0.0625)).tolist() == [[1.0] * 4]
    assert float(round_to(torch.full((1, 4), 2.0**-11), FORMATS["e4m3-unscaled"]).abs().max()) == 0.0


# --- the engine against whole passes --------------------------------------------------------------------------


class Literal:
    """A whole pass of the rounded model for one removed edge, node by node at all positions.

    Inputs are the clean ones less what the edge brought, plus what present senders changed, as the engine has
    it: rounded sums taken in another order would differ.
    """

    def __init__(self, model: Transformer, prompts: Prompts, graph: Graph, ablation: str, policy: Policy) -> None:
        self.model, self.graph, self.policy = model, graph, policy
        self.low = rounded(model, policy)
        self.clean = run(self.low, prompts.clean, graph.split_pos)
        self.reference = reference_run(self.low, prompts, ablation, graph.split_pos)

    def gap(self, column: int) -> Tensor:
        sender = self.graph.senders[column]
        now, then = self.clean.sender(sender), self.reference.sender(sender)
        if sender.kind != "head":
            return now - then
        write = self.low.blocks[sender.layer].attn.write
        return write(now, sender.index) - write(then, sender.index)

    def logits(self, edge: tuple[int, int]) -> Tensor:
        """Logits [B, T, V] without the edge."""
        graph, low, cfg = self.graph, self.low, self.model.config
        changed: dict[int, Tensor] = {}
        tested = graph.receivers[edge[0]]

        def under(row: int) -> bool:
            return self.policy.receiver_under_test and row == edge[0] and tested.is_attention

        def inputs(row: int) -> Tensor:
            x = self.clean.receiver(graph.receivers[row])
            if row == edge[0] and edge[1] != graph.direct:
                x = low.add(x, -self.gap(edge[1]))
            for column in range(graph.n_upstream(graph.receivers[row])):
                if column in changed and (row, column) != edge:
                    x = low.add(x, changed[column])
            return x

        where = torch.arange(self.clean.final.shape[1])
        for layer, block in enumerate(low.blocks):
            parts = {}
            for which, count in (("q", cfg.n_heads), ("k", cfg.n_kv_heads), ("v", cfg.n_kv_heads)):
                values = []
                for index in range(count):
                    head = index if which == "q" else index * cfg.group_size
                    row = graph.receiver_index[oracle.receiver_of(graph, layer, which, head)]
                    maths = self.model if under(row) else low
                    x = maths.attn_input(inputs(row), layer, which, where)
                    value = maths.blocks[layer].attn.project(x, which, index)
                    if edge == (row, graph.direct):
                        value = self.reference.projected(which, layer, index).expand_as(value)
                    values.append(value)
                parts[which] = torch.stack(values, 1)
            z = low.attend(parts["q"], parts["k"], parts["v"])
            for head in range(cfg.n_heads):
                fine = under(edge[0]) and tested.layer == layer and head in graph.heads_of(tested)
                write = (self.model if fine else low).blocks[layer].attn.write
                before = block.attn.write(self.clean.z[layer][:, head], head)
                changed[head_column(graph, layer, head)] = write(z[:, head], head) - before
            if block.mlp is not None and block.ln2 is not None:
                row = next(i for i, r in enumerate(graph.receivers) if r.kind == "mlp" and r.layer == layer)
                out = block.mlp(block.ln2(inputs(row)))
                changed[mlp_column(graph, layer)] = out - self.clean.mlp[layer]
        return low.unembed(inputs(len(graph.receivers) - 1))


@dataclass
class Plain:
    """Answers of one state from all its logits [1, N, P, V]; see ``task.metrics.Readout``."""

    all: Tensor

    def select(self, ids: Tensor) -> Tensor:
        return self.all.gather(-1, ids.clamp(min=0)[None])

    def expect(self, probabilities: Tensor) -> Tensor:
        return (self.all.to(probabilities.dtype) * probabilities).sum(-1)

    def logsumexp(self) -> Tensor:
        return torch.logsumexp(self.all.double(), -1)

    def logits(self) -> Tensor:
        return self.all


def metric_of(engine: Engine, case: Case, logits: Tensor, clean: Tensor) -> float:
    """The metric of logits [B, T, V]; where even its values are rounded, by the engine's own formula."""
    if engine.policy.format("metric").is_exact:
        return oracle.metric_value(case.metric, logits, clean, case.prompts)
    read = logits[torch.arange(len(case.prompts))[:, None], case.prompts.read]
    return float(engine.metric(Plain(read[None]))[0])


def single(graph: Graph, edges: list[tuple[int, int]]) -> Batch:
    """One state an edge, each without that edge alone; everything downstream follows."""
    marks = Marks.full(graph)
    for row in reversed(range(len(graph.receivers))):
        marks.finish(row)
    return Batch(edges, np.eye(len(edges), dtype=bool), marks)


def test_engine_agrees_with_whole_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """To FP32's digits but where a number lies between two steps of its format, and the last digit decides.

    (Products of other shapes add up in another order.) Such a state is off by a step somewhere, not by more.
    """
    off, rough, seen = list[float](), list[float](), Counter[str]()

    @drawn(100)
    @given(case=cases(torch.float32))
    def one(case: Case) -> None:
        policy = replace(
            get_policy(VALUES[case.seed % len(VALUES)]), under_test=("none", "receiver")[case.seed // 8 % 2]
        )
        draw = np.random.default_rng(case.seed)
        every = [(int(r), int(c)) for r, c in np.argwhere(case.graph.edges)]
        edges = sorted(every[i] for i in draw.choice(len(every), min(5, len(every)), replace=False))
        engine, fp32 = (
            Engine(case.model, case.prompts, case.graph, case.metric, case.ablation, screen=False, policy=name)
            for name in (policy, "fp32")
        )
        batch = single(case.graph, edges)
        values, right = engine.evaluate(batch)[0], fp32.evaluate(batch)[0]
        literal = Literal(case.model, case.prompts, case.graph, case.ablation, policy)
        clean = case.model.forward(case.prompts.clean)
        expected = [metric_of(engine, case, literal.logits(edge), clean) for edge in edges[: len(values)]]
        size = max(1.0, *map(abs, expected))
        off.extend(np.abs(values - expected) / size)
        rough.extend(np.abs(values - right[: len(values)]) / size)
        seen.update({policy.name, policy.under_test})

    one()
    near = float(np.mean(np.array(off) < 2e-5))
    with capsys.disabled():
        print(
            f"\nvalues: {near:.1%} of {len(off)} states as whole passes, the rest within {max(off):.2g}; "
            f"low precision itself: median {np.median(rough):.2g}"
        )
    assert near > 0.95
    assert max(off) < 0.3 * max(rough)
    assert len(seen) == len(VALUES) + 2


def pair(seed: int) -> Prompts:
    draw = torch.Generator().manual_seed(seed)
    clean, corrupt = (torch.randint(40, (3, 5), generator=draw) for _ in range(2))
    return last_position(clean, corrupt, [[1]] * 3, [[2]] * 3)


@pytest.mark.parametrize("name", VALUES)
def test_an_input_that_did_not_change_gives_the_same_output(name: str) -> None:
    """An edge from a sender that is the same in both runs changes nothing, to the last bit of the residual stream.

    (Not so if a head of the edge were in FP32 for that state alone.)
    """
    model, prompts, graph = grouped_model(), pair(0), Graph(CFG)
    same = replace(prompts, corrupt=prompts.clean)
    engine = Engine(model, same, graph, policy=get_policy(name, "none"))
    edges = [(row, 0) for row, receiver in enumerate(graph.receivers) if receiver.layer == 1]
    values, _ = engine.evaluate(single(graph, edges))
    assert values == pytest.approx(engine.base_metric, abs=2e-7)  # sums over the vocabulary are another matter
    assert engine._now is not None
    assert engine._now.final is not None
    first, final = engine._now.final
    assert first == 0
    for state in final:
        assert torch.equal(state, engine._base_final)


def test_no_head_is_under_test_in_a_base_state() -> None:
    """A committed state is the one computed afresh, also where its batch tested edges into one receiver alone."""
    model, graph = grouped_model(), Graph(CFG)
    engine = Engine(model, pair(0), graph, screen=False, policy="pahq-values")
    row = max(row for row, receiver in enumerate(graph.receivers) if receiver.kind == "v")
    marks = Marks.full(graph)
    for later in reversed(range(row + 1, len(graph.receivers))):
        marks.finish(later)
    edges = [(row, column) for column in graph.edges[row, : graph.direct].nonzero()[0][::2].tolist()]
    for edge in edges:
        marks.mask[edge] = False
    marks.finish(row)
    tested, _ = engine.evaluate(Batch(edges, np.tril(np.ones((len(edges), len(edges)), dtype=bool)), marks))
    engine.commit(len(edges) - 1)
    committed = engine.base_metric
    engine.rebase(marks)
    assert committed == pytest.approx(engine.base_metric, abs=1e-6)
    assert abs(tested[-1] - committed) > 1e-4  # while it was tested, that head was in FP32


@pytest.mark.parametrize("name", VALUES)
def test_the_reference_run_is_of_the_same_arithmetic(name: str) -> None:
    """Else cutting an edge would also swap one arithmetic for another."""
    model, prompts, graph, policy = grouped_model(), pair(1), Graph(CFG), get_policy(name)
    engine = Engine(model, prompts, graph, policy=policy)
    expected: Run = reference_run(rounded(model, policy), prompts, "resample")
    for ours, theirs in zip(engine.state.reference.z, expected.z, strict=True):
        assert torch.equal(ours, theirs)


def test_formats_that_overflow_end_in_one_line() -> None:
    weights: dict[str, Any] = random_weights(CFG, 0, set(), torch.float32)
    weights["blocks.0.mlp.W_in"] = weights["blocks.0.mlp.W_in"] * 1e4
    model = build(CFG, weights)
    batch = single(Graph(CFG), [(len(Graph(CFG).receivers) - 1, 0)])
    with pytest.raises(PahqError, match="e4m3 overflows to NaN beyond 448; use e4m3, which is scaled") as caught:
        Engine(model, pair(0), Graph(CFG), policy="values:mlp=e4m3-overflow").evaluate(batch)
    assert "\n" not in str(caught.value)
    assert np.isfinite(Engine(model, pair(0), Graph(CFG), policy="values:mlp=e4m3").evaluate(batch)[0]).all()
    assert get_format("e4m3-overflow").saturates is False
