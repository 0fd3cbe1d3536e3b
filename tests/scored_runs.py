"""What tests of scoring runs share: small runs of every method, a method of their own, and a process to start them.

As a script it prints a digest of every method's scores on one small model: python scored_runs.py
"""

from __future__ import annotations

import hashlib
import json
import sys
import types
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pahq import scoring
from pahq.api import Outcome, execute
from pahq.errors import PahqError
from pahq.method import registry
from pahq.method.base import Problem, Scores, Work
from pahq.method.registry import SCORING, Method
from pahq.report import machine
from pahq.report.config import RunConfig
from tiny import RandomTask, transformer

QUICK: dict[str, dict[str, Any]] = {
    "eap": {},
    "eap-ig": {"steps": 4},
    "exact": {"max_states": 16},
    "hisp": {},
    "subnetwork-probing": {"steps": 12},
    "edge-pruning": {"steps": 12},
    "information-flow": {},
    "random": {},
}
"""Options with which a run takes a second at most."""
METHODS = sorted(SCORING)
DOUBLE = "double"
MEMORY, LITTLE = 400_000, 40_000
"""Bytes a batch may take: so few that examples come in several pieces; for information flow, which takes less."""


def config(method: str, **more: Any) -> RunConfig:
    """Of a run on the small model that ``run`` makes. more: options in place of its own."""
    given: dict[str, Any] = {"edges": 60, "method_options": QUICK.get(method, {})} | more
    return RunConfig("object:Transformer", "object:random", method=method, metric="logit_diff", n=4, **given)


def run(out: Any, of: RunConfig, **more: Any) -> Outcome:
    return execute(of, out, model=transformer(layers=2), task=RandomTask(default_metric="logit_diff"), **more)


def in_pieces(monkeypatch: Any) -> None:
    """Little memory for methods, and no time spent on measuring the machine."""
    whole = scoring.problem_of

    def small(course: Any, *rest: Any) -> Problem:
        memory = LITTLE if course.config.method == "information-flow" else MEMORY
        return replace(whole(course, *rest), memory_limit=memory)

    monkeypatch.setattr(scoring, "problem_of", small)
    monkeypatch.setattr(machine, "gemm_peak", lambda *_: 1e11)


@dataclass(frozen=True)
class DoubleOptions:
    """steps: sums to take. pause: seconds a step takes. natural: its own threshold, if any."""

    steps: int = 40
    pause: float = 0.0
    natural: float | None = None
    kinds: tuple[str, ...] = ("a", "b")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise PahqError(f"steps {self.steps}: give at least 1")


def double_scores(problem: Problem, options: DoubleOptions, work: Work) -> Scores:
    """Random numbers summed up in FP32, so that the order of steps shows, kept at every step."""
    import time

    generator = torch.Generator().manual_seed(problem.seed)
    total, done, kept = torch.zeros(problem.graph.shape), 0, work.load()
    if kept is not None:
        total, done = kept[0]["total"], kept[1]["done"]
        generator.set_state(kept[0]["generator"])
    while done < options.steps:
        total += torch.randn(problem.graph.shape, generator=generator)
        done += 1
        time.sleep(options.pause)
        work.save({"total": total, "generator": generator.get_state()}, {"done": done})
        work.progress(done, options.steps)
    values = np.where(problem.graph.edges, total.double().numpy(), 0.0)
    return Scores(problem.graph, values, DOUBLE, natural=options.natural, notes=("made up",), stats={"passes": done})


def add_double() -> None:
    """Makes ``double`` a method like the others, for this process."""
    module = types.ModuleType(f"pahq.method.{DOUBLE}")
    vars(module).update(DoubleOptions=DoubleOptions, double_scores=double_scores)
    sys.modules[module.__name__] = module
    registry.METHODS[DOUBLE] = Method(DOUBLE, "made up", "baseline", natural_option="natural")
    from pahq.report import config as options

    for name in ("method", "prefilter"):
        options.CHOICES[name] = (*options.CHOICES[name], DOUBLE)


def main() -> None:
    torch.set_num_threads(1)
    machine.gemm_peak = lambda *_: 1e11
    digests = {}
    for method in METHODS:
        circuit = run(None, config(method)).circuit
        tensors = (circuit.mask, circuit.effects, circuit.order)
        digests[method] = hashlib.sha256(b"".join(tensor.tobytes() for tensor in tensors)).hexdigest()
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
