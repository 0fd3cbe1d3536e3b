"""Why a method misses edges of a known circuit: what it leaves out is put back step by step, and the AUC taken again.

HISP and subnetwork probing score nodes, not edges: nodes scored perfectly, 1 in the circuit and 0 elsewhere, show what
is lost when an edge gets the lesser score of its ends. HISP also divides every layer's scores by their length, and
takes a slope for an effect, as EAP does; measured effects show what that costs. Information flow divides what reaches
a head equally among q, k and v, and goes by the size of what is read, used or not.

Figures are means of the AUC over edges (by the scores' size), over all models. Everything rounded to 8 bits (``rtn``)
fails where sums in the residual stream lose what is added to them: ``lost_…`` is the share of numbers added there that
leave no trace, model by model.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Iterator
from unittest.mock import patch

import numpy as np

from common import finish, header, parser
from pahq.engine.gradients import Gradients
from pahq.errors import PahqError
from pahq.evaluation import roc
from pahq.evaluation.truth.base import Truth, load_truth, truth_names
from pahq.graph import Graph, Receiver
from pahq.method.base import Problem
from pahq.method.eap import EapOptions, eap_scores
from pahq.method.eap_ig import EapIgOptions, eap_ig_scores
from pahq.method.exact import exact_scores
from pahq.method.hisp import HispOptions, divided, hisp_scores, spread
from pahq.method.information_flow import information_flow_scores
from pahq.precision.policy import get_policy
from pahq.precision.store import WeightStore
from pahq.precision.values import RoundedTransformer, rounded_model
from pahq.report.console import make_console
from pahq.report.tables import Column, Row, decimals, percent, screen
from sweeps import Additions

REASONS = {
    "hisp": "its nature: one score for a node, which all its edges share; slopes, which saturate; and layers divided "
    "by their length, which lifts the nodes of layers that do nothing to the height of those that do the work",
    "subnetwork-probing": "its nature: masks on nodes, so that all edges between two kept nodes are kept",
    "eap": "its nature: the slope at the clean run, where a sharp attention pattern hardly moves although its keys "
    "decide everything; gradients at two points of the path repair it",
    "information-flow": "its nature: q, k and v of a head share alike what reaches it, and shares go by size: "
    "what is read but not used counts in full",
}
COLUMNS = [Column("method", "method", left=True), Column("case", "with", left=True)]


def problem_of(truth: Truth, most: int | None = None) -> Problem:
    """The behaviour that a known circuit is about. Raises PahqError where it has no model."""
    model, task = truth.model(), truth.task()
    n = truth.n if most is None else min(most, truth.n)
    prompts = task.prompts(model, n, seed=truth.seed)
    sloped = tuple(name for name in ("logit_diff", "nll") if name in task.metrics and name != truth.metric)
    return Problem(model, prompts, truth.graph, truth.metric, truth.ablation, fallbacks=sloped)


def examine(truth: Truth, methods: Iterable[str] = tuple(REASONS), most: int | None = None) -> list[Row]:
    """A row for each method and each thing put back: setting, method, case, auc. most: prompts at most."""
    problem = problem_of(truth, most)
    cases = {"hisp": _hisp, "subnetwork-probing": _probing, "eap": _eap, "information-flow": _flow}
    rows = []
    for method in methods:
        for case, places, values in cases[method](truth, problem):
            points = roc.ranked(np.abs(values), truth.mask, places)
            rows.append({"setting": truth.name, "method": method, "case": case, "auc": roc.auc(points)})
    return rows


Cases = Iterator[tuple[str, np.ndarray, np.ndarray]]
"""What was put back, the edges that count (bool) and the scores, both [n_receivers, n_senders + 1]."""


def _hisp(truth: Truth, problem: Problem) -> Cases:
    graph = truth.graph
    yield "nothing put back", graph.edges, hisp_scores(problem).values
    yield "layers not divided", graph.edges, hisp_scores(problem, HispOptions(normalise=False)).values
    corrupted = HispOptions(normalise=False, base="corrupted")
    yield "layers not divided, slopes of the corrupted run", graph.edges, hisp_scores(problem, corrupted).values
    effects = node_effects(problem)
    yield "measured effects of nodes, layers divided", graph.edges, spread(graph, divided(effects))
    yield "measured effects of nodes, layers not divided", graph.edges, spread(graph, effects)
    yield "nodes scored perfectly", graph.edges, spread(graph, perfect_nodes(graph, truth.mask))


def _probing(truth: Truth, problem: Problem) -> Cases:
    yield "nodes scored perfectly", truth.graph.edges, spread(truth.graph, perfect_nodes(truth.graph, truth.mask))


def _eap(truth: Truth, problem: Problem) -> Cases:
    edges = truth.graph.edges
    yield "nothing put back", edges, eap_scores(problem).values
    yield "slopes of the corrupted run", edges, eap_scores(problem, EapOptions(base="corrupted")).values
    for steps in (2, 5):
        yield (
            f"mean slope at {steps} points of the path",
            edges,
            eap_ig_scores(problem, EapIgOptions("inputs", steps)).values,
        )
    yield "measured effects of edges", edges, exact_scores(problem).values


def _flow(truth: Truth, problem: Problem) -> Cases:
    edges, alike = truth.graph.edges, alike_inputs(truth.graph, truth.mask)
    values = information_flow_scores(problem).values
    yield "nothing put back", edges, values
    yield "q, k and v beside one of the circuit not counted", edges & (truth.mask | ~alike), values
    yield "perfect but alike for q, k and v", edges, alike.astype(float)


def node_effects(problem: Problem) -> dict[str, float]:
    """How far the metric moves when a query, key, value or MLP alone is the reference run's, by HISP's names."""
    graph = Graph(problem.model.config, split_pos=problem.graph.split_pos)
    whole = Gradients(problem.model, problem.prompts, graph, problem.metric, problem.ablation)
    base, found = whole.value(whole.ones()), {}
    for row, receiver in enumerate(graph.receivers):
        if receiver.is_attention:
            gates = whole.ones()
            gates[row, graph.direct] = 0
            found[receiver.name] = abs(whole.value(gates) - base)
    for column, sender in enumerate(graph.senders):
        if sender.kind == "mlp":
            gates = whole.ones()
            gates[:, column] = 0
            found[sender.name] = abs(whole.value(gates) - base)
    return found


def perfect_nodes(graph: Graph, mask: np.ndarray) -> dict[str, float]:
    """1 for queries, keys, values and MLPs with an edge in the circuit (bool [n_receivers, n_senders + 1]), else 0."""
    found = {r.name: float(mask[row].any()) for row, r in enumerate(graph.receivers) if r.is_attention}
    return found | {s.name: float(mask[:, i].any()) for i, s in enumerate(graph.senders) if s.kind == "mlp"}


def alike_inputs(graph: Graph, mask: np.ndarray) -> np.ndarray:
    """The mask with every edge into a head's q, k or v in all three: bool [n_receivers, n_senders + 1]."""

    def head(receiver: Receiver) -> tuple[int, int]:
        """Layer, and group of heads."""
        return receiver.layer, receiver.index // (graph.config.group_size if receiver.kind == "q" else 1)

    of = [head(receiver) if receiver.is_attention else receiver for receiver in graph.receivers]
    together = np.array([[one == other for other in of] for one in of])
    return (together.astype(int) @ mask.astype(int) > 0) & graph.edges


def lost_additions(truth: Truth, most: int | None = None) -> float:
    """Share of numbers added up in the residual stream, everything rounded as by ``rtn``, that leave no trace."""
    problem, policy, additions = problem_of(truth, most), get_policy("rtn"), Additions()
    model = rounded_model(problem.model, policy, WeightStore(problem.model, policy))
    with patch.object(RoundedTransformer, "add", additions.add):
        model.residual(problem.prompts.clean)
    return additions.figures()["lost_share"]


def show_lost(lost: dict[str, float]) -> None:
    """Prints the shares by model."""
    shares = ", ".join(f"{name.removeprefix('trained-')} {percent(share)}" for name, share in lost.items())
    print(f"rtn: numbers added up in the residual stream that leave no trace: {shares}")


def means(rows: list[Row]) -> list[Row]:
    """A row for each method and case, with its mean over the models."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["case"]), []).append(row["auc"])
    return [{"method": m, "case": case, "auc": statistics.fmean(values)} for (m, case), values in groups.items()]


def show(rows: list[Row]) -> None:
    """Prints a table with a column for each model."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    wide: dict[tuple[str, str], Row] = {}
    for row in rows:
        wide.setdefault((row["method"], row["case"]), {**row})[row["setting"]] = row["auc"]
    for row in means(rows):
        wide[row["method"], row["case"]]["mean"] = row["auc"]
    columns = [Column(name, name.removeprefix("trained-"), decimals(3)) for name in (*settings, "mean")]
    make_console().print(screen(list(wide.values()), COLUMNS + columns))


def options() -> argparse.Namespace:
    made = parser(__doc__)
    trained = ",".join(name for name in truth_names() if name.startswith("trained-"))
    made.add_argument("--truths", default=trained, help="known circuits by name (default: all trained models)")
    made.add_argument("--methods", default=",".join(REASONS), help="(default %(default)s)")
    made.add_argument("--n", type=int, help="prompts at most (default: as the circuit says)")
    given = made.parse_args()
    given.methods = given.methods.split(",")
    for method in given.methods:
        if method not in REASONS:
            made.error(f"methods: '{method}' is not examined; known: {', '.join(REASONS)}")
    try:
        given.truths = [load_truth(name) for name in given.truths.split(",")]
    except PahqError as error:
        made.error(str(error))
    return given


def main() -> None:
    given, facts = options(), header()
    rows = [row for truth in given.truths for row in examine(truth, given.methods, given.n)]
    show(rows)
    for method in given.methods:
        print(f"{method}: {REASONS[method]}")
    lost = {truth.name: lost_additions(truth, given.n) for truth in given.truths}
    show_lost(lost)
    figures = {f"auc_{row['method']} ({row['case']})": row["auc"] for row in means(rows)}
    figures |= {f"lost_{name.removeprefix('trained-')}": share for name, share in lost.items()}
    finish(given.out, facts, figures, {"reasons": {m: REASONS[m] for m in given.methods}, "table": rows})


if __name__ == "__main__":
    main()
