"""EAP: edge attribution patching, the first-order effect of removing each edge, from one backward pass.

Syed et al. 2023 (arXiv 2310.10348), after Nanda's attribution patching. Direct edges are scored alike, by the
gradient with respect to the gate that mixes a query (key, value) with the reference run's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pahq.engine.gradients import interpolated, plain
from pahq.errors import PahqError
from pahq.method.attribution import computed_model, gradients_of, mean_scores, sloped_metric
from pahq.method.base import NoWork, Problem, Scores, Work

Base = Literal["clean", "corrupted"]


@dataclass(frozen=True)
class EapOptions:
    """base: the run at which the gradient is taken.

    ``clean``: the model on the clean prompts. ``corrupted``: the model on the reference run's embeddings (under
    resampling: on the corrupted prompts).
    """

    base: Base = "clean"

    def __post_init__(self) -> None:
        if self.base not in get_args(Base):
            raise PahqError(f"base '{self.base}' is unknown; choose one of {', '.join(get_args(Base))}")


def eap_scores(problem: Problem, options: EapOptions | None = None, work: Work | None = None) -> Scores:
    """Score of an edge: < dM/d(receiver's input), reference - clean value of the sender >, at the base point.

    A metric without slope at the clean run (kl_div) would give zeros there: then the first of ``problem.fallbacks``
    that has one is used, or else the corrupted base point, and the notes say so.
    Raises PahqError if the metric or a gradient is not finite.
    """
    options, work = options or EapOptions(), work or NoWork()
    model = computed_model(problem)
    metric, base, notes = problem.metric, options.base, []
    if base == "clean":
        sloped, note = sloped_metric(problem, model)
        if sloped is None:
            base, note = "corrupted", f"{note}; gradients are taken at the corrupted run"
        else:
            metric = sloped
        notes += [note] if note else []
    gradients = gradients_of(problem, model, metric)
    point = plain if base == "clean" else interpolated(0.0)
    values, metrics = mean_scores(gradients, [point], work)
    stats = {"metric": metric, "base": base, "value_at_base": metrics[0], "gradients": 1}
    return Scores(problem.graph, values, "eap", notes=tuple(notes), stats=stats)
