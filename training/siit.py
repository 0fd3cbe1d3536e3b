"""Trains a small transformer to implement a known program on known edges, and nothing beside them.

Strict interchange-intervention training (Gupta et al. 2024, InterpBench; Geiger et al. 2022), edge by edge. In each
step every prompt i of a batch has a source, another prompt, and three things are asked for at once:

* task: the plain model gives the program's answer;
* strictness: edges outside the circuit, drawn anew for every prompt (none, some or all of them), carry what they
  carry on the source, and the answer stays; so nothing outside the circuit can matter;
* interchange: in the same pass one or several edges of the circuit, or none, carry what they carry on the source, and
  the answer is what the program says if the same edges of it are interchanged; so every edge of the circuit matters.

Before that, for a share of the steps (``alone`` in ``cases.py``), the circuit is all there is: other edges carry means
over the batch, and linear probes (``probes.py``) hold its nodes to the program's variables. Else the model finds other
ways first, and a chain of heads takes long to appear.

One command a case, some minutes on one core each; same seed, same torch and one thread give the same weights:

    OMP_NUM_THREADS=1 python training/siit.py sum
    OMP_NUM_THREADS=1 python training/siit.py majority
    OMP_NUM_THREADS=1 python training/siit.py induction
    OMP_NUM_THREADS=1 python training/siit.py induction-offset
    OMP_NUM_THREADS=1 python training/siit.py maximum
    OMP_NUM_THREADS=1 python training/siit.py ioi

It writes ``model.safetensors``, ``truth.json`` (circuit, settings, figures) and ``losses.csv`` to
``src/pahq/evaluation/truth/trained/<case>``, or to --out. Sizes and lengths: ``cases.py``; programs: the package's
``evaluation/truth/algorithms.py`` and ``indirect_object.py``; ``--steps`` shortens a run to try something.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from cases import CASES, Case
from network import Network
from pahq.engine.full import FullEvaluator
from pahq.evaluation.truth.base import Truth, mask_of
from pahq.evaluation.truth.drawn import DrawnTask
from pahq.evaluation.truth.program import Program, Target, interchanged, untouched
from pahq.evaluation.truth.trained import HERE, PREFIX, get_program
from pahq.files import write_atomic
from pahq.graph import Graph
from pahq.model import Transformer, build
from pahq.task.score import accuracy, read_logits
from probes import Probes

COLUMNS = ("step", "loss_task", "loss_patched", "accuracy_task", "accuracy_strict", "accuracy_interchange")
SINGLE, SEVERAL = 0.45, 0.2
"""Shares of prompts with one edge of the circuit interchanged, and with several; the others have none."""
CUT_ALL, CUT_NONE = 0.3, 0.3
"""Shares of prompts with all other edges cut, and with none; in the others some are."""


@dataclass(frozen=True)
class Interventions:
    """gates [B, receivers, senders + 1], 0 where an edge carries the source's value; swapped: the circuit's by name."""

    gates: Tensor
    swapped: dict[str, Tensor]

    @property
    def any_swapped(self) -> Tensor:
        """bool [B]"""
        return torch.stack(list(self.swapped.values())).any(0)


class Interventor:
    """Draws interventions for a batch."""

    def __init__(self, graph: Graph, edges: list[str], generator: torch.Generator) -> None:
        self.edges, self.generator = edges, generator
        self.places = [graph.edge(edge) for edge in edges]
        self.shape = graph.shape

    def draw(self, batch: int, alone: bool = False) -> Interventions:
        """alone: all edges outside the circuit are cut for every prompt, and none of it is interchanged."""
        mode, amount, rest = (torch.rand(batch, generator=self.generator) for _ in range(3))
        keep = torch.where(rest < CUT_ALL, 0.0, torch.where(rest < CUT_ALL + CUT_NONE, 1.0, amount))
        gates = (torch.rand(batch, *self.shape, generator=self.generator) < keep[:, None, None]).float() * (not alone)
        one = torch.randint(len(self.edges), (batch,), generator=self.generator)
        some = torch.rand(batch, len(self.edges), generator=self.generator) < 0.3
        swap = torch.nn.functional.one_hot(one, len(self.edges)).bool() & (mode < SINGLE)[:, None]
        swap |= some & (mode > 1 - SEVERAL)[:, None]
        swap &= not alone
        for at, (row, column) in enumerate(self.places):
            gates[:, row, column] = (~swap[:, at]).float()
        return Interventions(gates, {edge: swap[:, at] for at, edge in enumerate(self.edges)})


def train(program: Program, case: Case) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Trained weights by name, and a row of losses and accuracies every 50 steps."""
    generator = torch.Generator().manual_seed(case.seed)
    network = Network(case.config(program.name, program.d_vocab, program.length), generator, case.alike, case.offset)
    interventor = Interventor(network.graph, program.edges(), generator)
    columns = {sender.name: at for at, sender in enumerate(network.graph.senders)}
    probes = Probes(program, columns, case.d_model, generator)
    parameters = [*network.weights.values(), *probes.weights.values()]
    decayed = [p for p in parameters if p.ndim > 1]
    rest = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": case.decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=case.rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, case.steps))
    partner = torch.arange(case.batch) ^ 1
    rows: list[dict[str, float]] = []
    for step in range(case.steps):
        tokens = program.draw(case.batch, generator)
        alone = step < case.alone * case.steps
        drawn = interventor.draw(case.batch, alone)
        plain = network.run(tokens)
        patched = network.run(tokens, drawn.gates, plain.mean() if alone else plain.of(partner))
        right = program.solve(tokens, untouched)
        moved = interchanged(program, tokens, tokens[partner], drawn.swapped)
        loss_task, loss_patched = _loss(plain.logits, right), _loss(patched.logits, moved)
        optimizer.zero_grad(set_to_none=True)
        held = probes.losses(tokens, patched.written) if alone else {}
        (loss_patched + (torch.stack(list(held.values())).sum() if alone else loss_task)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == case.steps - 1:
            strict = replace(moved, defined=moved.defined & ~drawn.any_swapped)
            swapped = replace(moved, defined=moved.defined & drawn.any_swapped)
            figures = (
                step,
                loss_task.item(),
                loss_patched.item(),
                _correct(plain.logits, right),
                _correct(patched.logits, strict),
                _correct(patched.logits, swapped),
            )
            rows.append(dict(zip(COLUMNS, figures, strict=True)))
            shown = rows[-1] | {f"probe {node}": loss.item() for node, loss in held.items()}
            print("  ".join(f"{name} {value:.4g}" for name, value in shown.items()), flush=True)
    return {name: weight.detach().contiguous() for name, weight in network.weights.items()}, rows


def _rate(step: int, steps: int) -> float:
    """Share of the full learning rate: a short rise, then half a cosine down to a hundredth."""
    return min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _loss(logits: Tensor, target: Target) -> Tensor:
    """Mean cross-entropy where the target is defined."""
    losses = -(target.probabilities * torch.log_softmax(logits, dim=-1)).sum(-1)
    return (losses * target.defined).sum() / target.defined.sum().clamp(min=1)


def _correct(logits: Tensor, target: Target) -> float:
    """Share of defined targets of one token that the logits prefer."""
    sure = target.defined & (target.probabilities.amax(-1) == 1)
    right = logits.argmax(-1) == target.probabilities.argmax(-1)
    return float((right & sure).sum() / sure.sum().clamp(min=1))


@torch.no_grad()
def figures(model: Transformer, program: Program, graph: Graph, mask: np.ndarray, n: int = 100) -> dict[str, object]:
    """How the finished model fares on validation prompts, in our own engine: accuracy of the model and of its circuit
    alone, and the effect of removing each edge alone from the model (KL divergence in nats, mean over prompts).
    """
    prompts = DrawnTask(program).prompts(model, n)
    evaluator = FullEvaluator(model, prompts, graph)
    clean = torch.log_softmax(read_logits(model, prompts).double(), dim=-1)

    def divergence(logits: Tensor) -> float:
        return float((clean.exp() * (clean - torch.log_softmax(logits.double(), dim=-1))).sum(-1).mean())

    def without(row: int, column: int) -> float:
        present = graph.edges.copy()
        present[row, column] = False
        return divergence(evaluator.logits(present))

    alone = evaluator.logits(mask)
    inside = {graph.edge_name(r, c): without(r, c) for r, c in np.argwhere(mask).tolist()}
    outside = {graph.edge_name(r, c): without(r, c) for r, c in np.argwhere(graph.edges & ~mask).tolist()}
    return {
        "stream_mean": float(model.W_E.mean() + model.W_pos.mean()) if model.W_pos is not None else 0.0,
        "accuracy": accuracy(clean, prompts),
        "accuracy_circuit": accuracy(alone, prompts),
        "kl_circuit": divergence(alone),
        "kl_without_edge": inside,
        "kl_without_other_edge": max(outside.values()),
        "other_edge": max(outside, key=lambda edge: outside[edge]),
    }


def _csv(rows: list[dict[str, float]]) -> Iterator[str]:
    yield ",".join(COLUMNS)
    for row in rows:
        yield ",".join(f"{row[name]:.6g}" for name in COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains one model with a known circuit.")
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--steps", type=int, help="fewer or more steps than the case's own")
    parser.add_argument("--seed", type=int, help="another seed than the case's own")
    parser.add_argument("--out", type=Path, help="folder of the files; default: where the package keeps them")
    arguments = parser.parse_args()
    case = CASES[arguments.case]
    given = {name: getattr(arguments, name) for name in ("steps", "seed") if getattr(arguments, name) is not None}
    case = replace(case, **given)
    program = get_program(arguments.case)
    weights, rows = train(program, case)
    config = case.config(program.name, program.d_vocab, program.length)
    graph, model = Graph(config), build(config, weights)
    mask = mask_of(graph, program.edges())
    found = figures(model, program, graph, mask)
    for name, value in found.items():
        print(name, value)
    truth = Truth(
        name=PREFIX + program.name,
        about=program.about,
        graph=graph,
        mask=mask,
        facts={"training": asdict(case), "torch": torch.__version__, "validation": found},
    )
    out = HERE / arguments.case if arguments.out is None else arguments.out
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "model.safetensors", save(weights))
    write_atomic(out / "losses.csv", ("\n".join(_csv(rows)) + "\n").encode())
    truth.save(out / "truth.json")


if __name__ == "__main__":
    main()
