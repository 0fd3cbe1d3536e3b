"""Programs that models are trained to be: answers and interventions against plain Python, and their prompts."""

from __future__ import annotations

import pytest
import torch

from pahq.errors import PahqError
from pahq.evaluation.truth.algorithms import Sum
from pahq.evaluation.truth.drawn import DrawnTask
from pahq.evaluation.truth.program import interchanged, untouched
from pahq.evaluation.truth.trained import PROGRAMS, get_program
from pahq.graph import Graph
from pahq.model import ModelConfig, Transformer, build
from pahq.model.transformer import shapes

ALL = sorted(PROGRAMS)


def by_hand(name: str, row: list[int]) -> int:
    """What a prompt's answer is, as one would say it without any program."""
    if name == "sum":
        return (row[1] + row[3]) % 10
    if name == "majority":
        return int(row.count(1) > row.count(0))
    if name.startswith("induction"):
        return row[row.index(row[-1]) + 1]
    if name == "maximum":
        return max(row[:-1])
    names = [token for token in row if token < 12]  # ioi: of three names the one that comes once
    assert len(names) == 3
    return next(one for one in names if names.count(one) == 1)


def draw(name: str, n: int, seed: int = 0) -> torch.Tensor:
    return get_program(name).draw(n, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ALL)
def test_answers(name: str) -> None:
    program, tokens = get_program(name), draw(name, 300)
    assert tokens.shape == (300, program.length)
    assert tokens.min() >= 0
    assert tokens.max() < program.d_vocab
    target = program.solve(tokens, untouched)
    assert target.defined.all()
    assert torch.equal(target.probabilities.sum(1), torch.ones(300))
    assert target.probabilities.argmax(1).tolist() == [by_hand(name, row) for row in tokens.tolist()]


@pytest.mark.parametrize("name", ALL)
def test_all_edges_swapped_give_the_source_and_each_edge_matters(name: str) -> None:
    program, base, source = get_program(name), draw(name, 400), draw(name, 400, seed=1)
    everywhere = torch.ones(400, dtype=torch.bool)
    everything = dict.fromkeys(program.edges(), everywhere)
    swapped = interchanged(program, base, source, everything)
    assert torch.equal(swapped.probabilities, program.solve(source, untouched).probabilities)
    clean = program.solve(base, untouched).probabilities
    for edge in program.edges():
        moved = interchanged(program, base, source, {edge: everywhere})
        changed = (moved.probabilities != clean).any(1) | ~moved.defined
        assert changed.float().mean() > 0.2, edge
        half = torch.arange(400) < 200
        some = interchanged(program, base, source, {edge: half})
        assert torch.equal(some.probabilities[200:], clean[200:])
        assert torch.equal(some.probabilities[:200], moved.probabilities[:200])


def test_interchange_by_hand() -> None:
    def moved(name: str, base: list[int], source: list[int], *edges: str) -> int | None:
        target = interchanged(
            get_program(name), torch.tensor([base]), torch.tensor([source]), {e: torch.tensor([True]) for e in edges}
        )
        return int(target.probabilities.argmax()) if target.defined.all() else None

    digits = ([1, 2, 3, 4, 5, 10], [0, 7, 0, 9, 0, 10])
    assert moved("sum", *digits, "embed->a0.1.v") == (7 + 4) % 10
    assert moved("sum", *digits, "a0.2->m1") == (2 + 9) % 10
    assert moved("sum", *digits, "direct->a0.1.v", "direct->a0.2.v") == (7 + 9) % 10
    pairs = ([5, 9, 3, 1, 0, 2, 4, 6, 7, 8, 10, 3], [9, 5, 0, 3, 1, 2, 4, 6, 7, 8, 10, 9])
    assert moved("induction", *pairs) == 1
    assert moved("induction", *pairs, "embed->a2.1.q") == 3  # 9 is followed by 3
    assert moved("induction", *pairs, "a0.2->a2.1.k") == 0  # 3 stands at 3 there; what comes after it here
    assert moved("induction", *pairs, "embed->a2.1.v") == 3
    assert moved("induction", *pairs, "direct->a2.1.q", "direct->a2.1.v") == 0
    numbers = ([1, 9, 2, 3, 4, 5, 6, 16], [7, 8, 10, 3, 4, 5, 6, 16])
    assert moved("maximum", *numbers, "embed->a1.2.k") == 2
    assert moved("maximum", *numbers, "embed->a1.2.v") == 8
    told = ([20, 20, 3, 20, 5, 20, 20, 3, 20, 20, 20, 31], [20, 20, 6, 20, 7, 20, 20, 20, 7, 20, 20, 31])
    assert moved("ioi", *told) == 5
    assert moved("ioi", *told, "a2.2->a4.0.q") == 3  # there the second name comes again: take the first
    assert moved("ioi", *told, "embed->a4.0.v") == 7
    assert moved("ioi", *told, "embed->a0.1.q") is None  # nothing comes again
    assert moved("ioi", *told, "embed->a0.1.q", "embed->a0.1.k") == 3
    assert moved("ioi", *told, "a0.1->a2.2.k") is None  # looks where nothing is
    assert moved("ioi", *told, "a0.1->a2.2.k", "a0.1->a2.2.v") == 3


def test_majority_of_an_intervened_tie_is_open() -> None:
    base = torch.tensor([[0, 0, 0, 1, 1, 5, 5, 5, 5, 8]])
    source = torch.tensor([[1, 1, 1, 0, 5, 5, 5, 5, 5, 8]])
    target = interchanged(get_program("majority"), base, source, {"a1.0->m2": torch.tensor([True])})
    assert target.probabilities[0, :2].tolist() == [0.5, 0.5]
    assert target.defined.all()


def blank(name: str, **changes: int) -> Transformer:
    """Any model that the prompts fit into."""
    program = get_program(name)
    cfg = ModelConfig(
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        d_model=4,
        d_head=4,
        d_mlp=4,
        d_vocab=changes.get("d_vocab", program.d_vocab),
        d_vocab_out=program.d_vocab,
        n_ctx=changes.get("n_ctx", program.length),
    )
    return build(cfg, {weight: torch.zeros(shape) for weight, (shape, _) in shapes(cfg).items()})


@pytest.mark.parametrize("name", ALL)
def test_prompts(name: str) -> None:
    task, model = DrawnTask(get_program(name)), blank(name)
    splits = {split: task.prompts(model, 60, seed=3, split=split) for split in ("train", "validation", "test")}
    rows = [tuple(row) for p in splits.values() for side in (p.clean, p.corrupt) for row in side.tolist()]
    assert len(set(rows)) == len(rows) == 360
    for prompts in splits.values():
        assert prompts.answers.flatten().tolist() == [by_hand(name, row) for row in prompts.clean.tolist()]
        assert prompts.wrong.flatten().tolist() == [by_hand(name, row) for row in prompts.corrupt.tolist()]
        assert not (prompts.answers == prompts.wrong).any()
        assert (prompts.read == task.program.length - 1).all()
    fewer = task.prompts(model, 20, seed=3)
    assert torch.equal(fewer.clean, splits["validation"].clean[:20])
    assert torch.equal(fewer.corrupt, splits["validation"].corrupt[:20])
    assert not torch.equal(task.prompts(model, 20, seed=4).clean, fewer.clean)
    whole = task.prompts(model, 9, seed=3, split="all")
    assert torch.equal(whole.clean[1::3], splits["validation"].clean[:3])


def test_refusals() -> None:
    task = DrawnTask(get_program("sum"))
    with pytest.raises(PahqError, match="knows 5 tokens in 6 positions, but the prompts have 11 in 6"):
        task.prompts(blank("sum", d_vocab=5), 4)
    with pytest.raises(PahqError, match="positions"):
        task.prompts(blank("sum", n_ctx=3), 4)
    with pytest.raises(PahqError, match="ask for at least 1"):
        task.prompts(blank("sum"), 0)
    with pytest.raises(PahqError, match="'nothing' is unknown; choose one of"):
        get_program("nothing")


def test_too_many_examples_are_refused() -> None:
    class Few(Sum):
        name = "few"

        def draw(self, n: int, generator: torch.Generator) -> torch.Tensor:
            return super().draw(n, generator).clamp(max=1).index_fill(1, torch.tensor([5]), 10)

    task = DrawnTask(Few())
    with pytest.raises(PahqError, match=r"40 examples asked for, but split 'test' has \d"):
        task.prompts(blank("sum"), 40, split="test")


@pytest.mark.parametrize("name", ALL)
def test_edges_are_of_a_graph_and_lead_from_the_embedding_to_the_logits(name: str) -> None:
    cfg = ModelConfig(
        n_layers=6, n_heads=4, n_kv_heads=4, d_model=8, d_head=2, d_mlp=8, d_vocab=40, d_vocab_out=40, n_ctx=16
    )
    graph = Graph(cfg)
    edges = get_program(name).edges()
    assert len(edges) == len(set(edges))
    ends = [edge.split("->") for edge in edges]
    for edge, (sender, receiver) in zip(edges, ends, strict=True):
        graph.edge(edge)
        assert sender in ("embed", "direct") or any(r.startswith(sender) for _, r in ends), edge
        node = receiver.rsplit(".", 1)[0] if receiver[0] == "a" else receiver
        assert receiver == "logits" or any(s == node for s, _ in ends), edge
        assert receiver[0] != "a" or f"direct->{receiver}" in edges
