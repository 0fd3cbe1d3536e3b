"""EAP-IG: edge attribution patching with gradients averaged between the reference run and the clean one.

Hanna et al. 2024 (arXiv 2403.17806), after integrated gradients (Sundararajan et al. 2017); variants as in the MIB
benchmark (Mueller et al. 2025, arXiv 2504.13151). Direct edges are scored alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pahq.engine.gradients import Point, held, interpolated, plain
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.method.attribution import computed_model, gradients_of, mean_scores, sloped_metric
from pahq.method.base import NoWork, Problem, Scores, Work

Variant = Literal["inputs", "activations", "clean-corrupted"]


@dataclass(frozen=True)
class EapIgOptions:
    """variant: where gradients are taken; steps: points on each path (``clean-corrupted`` has its two ends only).

    ``inputs``: runs from embeddings at 1/steps, 2/steps, … 1 of the way from the reference run to the clean one.
    ``activations``: clean runs in which the embeddings, each layer's heads and each MLP in turn stand at such points;
    as in the benchmark, an edge's score is the mean over all these runs, not over its own sender's alone, and no
    gradient goes back through the values that are given. ``clean-corrupted``: the clean run, and the model on the
    reference run's embeddings (under resampling: on the corrupted prompts).
    """

    variant: Variant = "inputs"
    steps: int = 5

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise PahqError(f"variant '{self.variant}' is unknown; choose one of {', '.join(get_args(Variant))}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise PahqError(f"steps {self.steps!r}: give a whole number of at least 1, for example 5")


def eap_ig_scores(problem: Problem, options: EapIgOptions | None = None, work: Work | None = None) -> Scores:
    """Score of an edge: < mean of dM/d(receiver's input), reference - clean value of the sender >.

    With a single step all points are the clean run; a metric without slope there (kl_div) is then replaced by the
    first of ``problem.fallbacks`` that has one, as the notes say. Raises PahqError where there is none, and if the
    metric or a gradient is not finite.
    """
    options, work = options or EapIgOptions(), work or NoWork()
    model = computed_model(problem)
    metric, notes = problem.metric, []
    if options.steps == 1 and options.variant != "clean-corrupted":
        sloped, note = sloped_metric(problem, model)
        if sloped is None:
            raise PahqError(f"{note}, and a single step looks nowhere else; take 2 steps or more")
        metric, notes = sloped, [note] if note else []
    points = list(_points(options, problem.graph))
    values, metrics = mean_scores(gradients_of(problem, model, metric), points, work)
    stats = {"metric": metric, "variant": options.variant, "gradients": len(points), "values_at_points": metrics}
    return Scores(problem.graph, values, "eap-ig", notes=tuple(notes), stats=stats)


def _points(options: EapIgOptions, graph: Graph) -> Iterator[Point]:
    """The runs at which gradients are taken, in order."""
    if options.variant == "clean-corrupted":
        yield from (plain, interpolated(0.0))
        return
    shares = [step / options.steps for step in range(1, options.steps + 1)]
    if options.variant == "inputs":
        yield from (interpolated(share) for share in shares)
        return
    for columns in _groups(graph):
        yield from (held(columns, share) for share in shares)


def _groups(graph: Graph) -> Iterator[Sequence[int]]:
    """Columns of the senders that move together: the embeddings, a layer's heads, an MLP."""
    groups: dict[tuple[str, int], list[int]] = {}
    for column, sender in enumerate(graph.senders):
        kind = "embed" if sender.layer < 0 else sender.kind
        groups.setdefault((kind, sender.layer), []).append(column)
    yield from groups.values()
