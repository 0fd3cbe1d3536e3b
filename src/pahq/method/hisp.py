"""Head importance score for pruning: how far a node's value moves the metric, to first order, example by example.

Michel et al. 2019 (arXiv 1905.10650), as Conmy et al. 2023 compare it with ACDC: the score of a node is

    mean over examples of |sum over positions and dimensions of (value - reference) * dM/dvalue|

divided by the length of its layer's vector of scores. Nodes are spread to edges as in a circuit made of nodes, which
has an edge where it has both ends: an edge scores the lesser of its two nodes, a direct edge its own node, and what
has no score (embeddings, logits) never is the lesser. A head stays a sender as long as its query, key or value stays,
so as a sender it scores the largest of the three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pahq.engine.gradients import Gradients, interpolated, plain
from pahq.engine.soft import Senders, SoftPass
from pahq.errors import PahqError
from pahq.graph import Graph, Sender
from pahq.method.attribution import sloped_metric
from pahq.method.base import NoWork, Problem, Scores, Work
from pahq.precision.differentiable import differentiable

Kinds = Literal["qkv", "heads"]
Base = Literal["clean", "corrupted"]


@dataclass(frozen=True)
class HispOptions:
    """kinds: which nodes attention has: ``qkv``, a query, key and value each (ACDC's comparison), or ``heads``.

    normalise: by the length of each layer's vector of scores. base: the run at which gradients are taken.
    """

    kinds: Kinds = "qkv"
    normalise: bool = True
    base: Base = "clean"

    def __post_init__(self) -> None:
        for name, known in (("kinds", Kinds), ("base", Base)):
            if getattr(self, name) not in get_args(known):
                raise PahqError(
                    f"hisp: {name} '{getattr(self, name)}' is unknown; choose one of {', '.join(get_args(known))}"
                )
        if not isinstance(self.normalise, bool):
            raise PahqError(f"hisp: normalise is {self.normalise!r}; give true or false")


def hisp_scores(problem: Problem, options: HispOptions | None = None, work: Work | None = None) -> Scores:
    """Importance of every edge, at least 0 (it does not tell whether the edge helps or harms).

    A metric without slope at the clean run (kl_div) would give zeros there: then the first of ``problem.fallbacks``
    that has one is used, or else the corrupted run as base, and the notes say so.
    Raises PahqError if the metric or a gradient is not finite.
    """
    options, work = options or HispOptions(), work or NoWork()
    model = differentiable(problem.model, problem.policy)
    metric, base, notes = problem.metric, options.base, []
    if base == "clean":
        sloped, note = sloped_metric(problem, model)
        if sloped is None:
            base, note = "corrupted", f"{note}; gradients are taken at the corrupted run"
        else:
            metric = sloped
        notes += [note] if note else []
    # Queries, keys and values are scored by their direct edges, which the problem's own graph may lack.
    graph = Graph(model.config, split_pos=problem.graph.split_pos)
    gradients = Gradients(
        model, problem.prompts, graph, metric, problem.ablation, problem.memory_limit, full=problem.model
    )
    nodes, pieces = _Nodes(graph), len(gradients.pieces)
    done, partial, kept = 0, None, work.load()
    if kept is not None:
        tensors, facts = kept
        if facts.get("pieces") != pieces:
            raise PahqError(
                f"state: it was kept for {facts.get('pieces')} pieces of the examples, not for {pieces}; "
                "resume with the memory limit that the run began with"
            )
        done, partial = int(facts["done"]), tensors["partial"]
        nodes.take(tensors)

    def after(count: int, summed: Tensor) -> None:
        work.save({**nodes.tensors(), "partial": summed.cpu().clone()}, {"done": count, "pieces": pieces})
        work.progress(count, pieces)

    point = plain if base == "clean" else interpolated(0.0)
    value, _ = gradients.gradient(gradients.ones(), point, nodes.visit, done, partial, after)
    values = spread(problem.graph, nodes.scores(options))
    stats = {"metric": metric, "base": base, "value_at_base": value, "gradients": 1}
    return Scores(problem.graph, values, "hisp", signed=False, notes=tuple(notes), stats=stats)


class _Nodes:
    """Sums over examples of the sizes of nodes' slopes. sent [senders], computed [receivers] float64."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.sent = torch.zeros(len(graph.senders), dtype=torch.float64)
        self.computed = torch.zeros(len(graph.receivers), dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        return {"sent": self.sent.clone(), "computed": self.computed.clone()}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        self.sent, self.computed = tensors["sent"].clone(), tensors["computed"].clone()

    def visit(self, piece: slice, soft: SoftPass, senders: Senders) -> None:
        """Adds some examples, whose backward pass is over."""
        assert senders.gradient is not None
        differences = senders.now if senders.scored is None else senders.scored.now
        slopes = torch.einsum("sntd,sntd->sn", senders.gradient.double(), differences.double())
        self.sent += slopes.abs().sum(-1).cpu()
        for (which, layer), slope in senders.slopes.items():
            rows = soft.rows[layer][which]
            self.computed[rows] += slope.double().abs().sum(0).cpu()

    def scores(self, options: HispOptions) -> dict[str, float]:
        """Scores of nodes by name: ``a0.1.q`` … ``a0.1.v`` (a group's k and v), or ``a0.1``; ``m0``."""
        out: dict[str, float] = {}
        if options.kinds == "qkv":
            out |= {r.name: float(self.computed[i]) for i, r in enumerate(self.graph.receivers) if r.is_attention}
        for column, sender in enumerate(self.graph.senders):
            if sender.kind == "mlp" or (sender.kind == "head" and options.kinds == "heads"):
                out[sender.name] = float(self.sent[column])
        return divided(out) if options.normalise else out


def divided(nodes: Mapping[str, float]) -> dict[str, float]:
    """Scores of nodes, each by the length of its layer's vector of scores (where that is above 0)."""
    layers: dict[str, list[str]] = {}
    for name in nodes:
        layers.setdefault(name.lstrip("am").partition(".")[0], []).append(name)
    lengths = {layer: float(np.linalg.norm([nodes[name] for name in here])) for layer, here in layers.items()}
    return {name: nodes[name] / (lengths[layer] or 1.0) for layer, here in layers.items() for name in here}


def spread(graph: Graph, nodes: Mapping[str, float]) -> np.ndarray:
    """Scores of nodes (see ``_Nodes.scores``) -> of edges, float64 [n_receivers, n_senders + 1].

    embed -> logits, which has no scored node, gets the largest score of all.
    """
    values, most = np.zeros(graph.shape), max(nodes.values(), default=0.0)

    def reading(head: int, layer: int) -> list[str]:
        """The nodes that a head consists of."""
        whole, group = f"a{layer}.{head}", head // graph.config.group_size
        return [whole] if whole in nodes else [f"{whole}.q", f"a{layer}.{group}.k", f"a{layer}.{group}.v"]

    def sending(sender: Sender) -> float:
        if sender.kind == "head":
            return max(nodes[name] for name in reading(sender.index, sender.layer))
        return nodes[sender.name] if sender.kind == "mlp" else most

    sent = np.array([sending(sender) for sender in graph.senders])
    for row, receiver in enumerate(graph.receivers):
        if receiver.kind == "logits":
            own = most
        elif receiver.name in nodes:
            own = nodes[receiver.name]
        else:  # a head's input without a score of its own, or one shared by q, k and v
            own = max(nodes[name] for head in graph.heads_of(receiver) for name in reading(head, receiver.layer))
        upstream = graph.n_upstream(receiver)
        values[row, :upstream] = np.minimum(sent[:upstream], own)
        if graph.edges[row, graph.direct]:
            values[row, graph.direct] = own
    return values
