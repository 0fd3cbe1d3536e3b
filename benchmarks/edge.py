"""One edge's effect on the way from present to removed: why a slope at the clean run may say little about it.

A gate goes from 1 (present) to 0 (removed). EAP's score is minus the metric's slope at 1; minus the integral of the
slope over the gate is the exact effect of removing the edge, whatever lies between. Printed are the metric and the
slope along the way, EAP's score with finite differences beside it, the integral, the effect as measured, and EAP-IG's
score, whose slopes are those of the whole model between the corrupted embeddings and the clean ones.

By default this is the edge that EAP gets most wrong on SmolLM2-135M, ioi: embeddings into the first MLP. With --edges,
the share of the metric that the best so many edges by EAP's signed scores recover, and the same with the edge added.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from common import finish, header, parser
from pahq.engine.gradients import Gradients, interpolated
from pahq.errors import PahqError
from pahq.evaluation.faithfulness import recovered
from pahq.evaluation.truth.base import load_truth
from pahq.graph import Graph
from pahq.method.select import top
from pahq.model import load_model
from pahq.report.console import make_console
from pahq.report.tables import Column, number, screen
from pahq.task import get_task

STEP = 1e-3
"""Of the finite difference, as a share of the gate."""
COLUMNS = [
    Column("gate", "gate", number(3)),
    Column("metric", "metric", number(4)),
    Column("score", "minus its slope", number(4)),
]


def options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--model", default="smollm2-135m", help="(default %(default)s)")
    made.add_argument("--task", default="ioi", help="(default %(default)s)")
    made.add_argument("--truth", help="a known circuit's model and prompts instead")
    made.add_argument("--metric", default="logit_diff", help="(default %(default)s)")
    made.add_argument("--edge", default="embed->m0", help="(default %(default)s)")
    made.add_argument("--n", type=int, default=4, help="prompts (default %(default)s)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--points", type=int, default=20, help="of the integral (default %(default)s)")
    made.add_argument("--steps", type=int, default=5, help="of EAP-IG (default %(default)s)")
    made.add_argument("--edges", type=int, help="size of the circuit that the edge is added to")
    given = made.parse_args()
    for name in ("n", "points", "steps"):
        if getattr(given, name) < 1:
            made.error(f"{name}: {getattr(given, name)} is too few; give at least 1")
    try:
        if given.truth is not None:
            truth = load_truth(given.truth)
            given.loaded, given.prompts = truth.model(), truth.task()
        else:
            given.loaded, given.prompts = load_model(given.model), get_task(given.task)
        given.place = Graph(given.loaded.config).edge(given.edge)
    except PahqError as error:
        made.error(str(error))
    return given


def along(gradients: Gradients, place: tuple[int, int], points: int) -> list[dict[str, float]]:
    """Metric and minus its slope at the middles of ``points`` equal parts of the way, and at both ends."""
    rows = []
    for gate in [1.0, *(1 - (i + 0.5) / points for i in range(points)), 0.0]:
        gates = gradients.ones()
        gates[place] = gate
        value, slope = gradients.gradient(gates)
        rows.append({"gate": gate, "metric": value, "score": -float(slope[place])})
    return rows


def added(gradients: Gradients, values: np.ndarray, place: tuple[int, int], edges: int) -> dict[str, float | None]:
    """Recovered by the best edges of scores [n_receivers, n_senders + 1], and with one more."""
    graph = gradients.graph
    mask = top(graph, values, edges)
    full, empty = (gradients.value(gradients.gates(m)) for m in (graph.edges, graph.edges & False))
    with_it = mask.copy()
    with_it[place] = True
    names = {"recovered": mask, "recovered_with_edge": with_it}
    return {name: recovered(gradients.value(gradients.gates(m)), empty, full) for name, m in names.items()}


def main() -> None:
    given, facts = options(), header()
    model, graph, place = given.loaded, Graph(given.loaded.config), given.place
    prompts = given.prompts.prompts(model, given.n, seed=given.seed)
    gradients = Gradients(model, prompts, graph, given.metric)
    base, slopes = gradients.gradient(gradients.ones())
    nearly = gradients.ones()
    nearly[place] -= STEP
    shares = [step / given.steps for step in range(1, given.steps + 1)]
    rows = along(gradients, place, given.points)
    figures: dict[str, Any] = {
        "eap": -float(slopes[place]),
        "finite_difference": (gradients.value(nearly) - base) / STEP,
        "integral": sum(row["score"] for row in rows[1:-1]) / given.points,
        "exact": rows[-1]["metric"] - base,
        "eap_ig": -sum(float(gradients.gradient(gradients.ones(), interpolated(s))[1][place]) for s in shares)
        / given.steps,
    }
    values = -slopes.cpu().numpy()
    strength = np.abs(values[graph.edges])
    figures["rank_signed"] = int((values[graph.edges] > values[place]).sum()) + 1
    figures["rank_by_size"] = int((strength > abs(values[place])).sum()) + 1
    if given.edges is not None:
        figures |= added(gradients, values, place, given.edges)
    make_console().print(screen(rows, COLUMNS))
    print(f"{given.edge} of {graph.n_edges} edges, {given.metric} on {len(prompts)} prompts")
    kept = {key: str(value) for key, value in vars(given).items() if key not in ("loaded", "prompts", "place")}
    finish(given.out, facts, figures, {"options": kept, "path": rows})


if __name__ == "__main__":
    main()
