"""Subnetwork probing: hard-concrete gates on nodes, trained for few open ones. Cao et al. 2021; Conmy et al. 2023.

Nodes are those of ACDC's baseline: with split inputs the computed query, key and value of every head (keys and values
once a group) and every MLP; otherwise every head's output and every MLP. A closed gate gives the reference run's
value. The embeddings and the logits have no gate.

    loss = (metric - full model's metric) / range + regularisation * share of gates that are open, expected

Edges: a head counts as open as the most open of its query, key and value, and an edge as the less open of its two
ends. So the edges above a threshold are those between nodes above it, which is the published rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pahq.graph import Graph, Sender
from pahq.method import hard_concrete
from pahq.method.base import NoWork, Problem, Scores, Work
from pahq.method.mask_training import Parameters, Training, count, number, prepare

NAME = "subnetwork-probing"


@dataclass(frozen=True)
class SubnetworkProbingOptions:
    """regularisation: what an open gate costs (lambda): the loss of all, in parts of the metric's range.

    steps: updates. lr: Adam's. start: gates' value at first (Cao et al.: 0.9). batch: examples of a step, 0 for all.
    """

    regularisation: float = 1.0
    steps: int = 300
    lr: float = 0.1
    start: float = 0.9
    batch: int = 0

    def __post_init__(self) -> None:
        number(self, "regularisation", 0, float("inf"), NAME, "[)")
        number(self, "lr", 0, float("inf"), NAME)
        number(self, "start", 0, 1, NAME)
        count(self, "steps", 1, NAME)
        count(self, "batch", 0, NAME)


class NodeMask:
    """One gate a node. attention: rows of the attention receivers that have one; columns: senders that have one."""

    def __init__(self, graph: Graph, options: SubnetworkProbingOptions) -> None:
        self.graph, self.options = graph, options
        split = graph.split_qkv
        self.attention = [row for row, one in enumerate(graph.receivers) if one.is_attention and split]
        self.columns = [
            column
            for column, one in enumerate(graph.senders)
            if one.kind == "mlp" or (one.kind == "head" and not split)
        ]
        self.log_alpha = torch.full(
            (len(self.attention) + len(self.columns),),
            hard_concrete.log_alpha_of(options.start),
            dtype=torch.float64,
            requires_grad=True,
        )

    def parameters(self) -> list[Parameters]:
        return [Parameters({"log_alpha": self.log_alpha}, self.options.lr)]

    def gates(self, generator: torch.Generator) -> Tensor:
        return self.spread(hard_concrete.sample(self.log_alpha, generator))

    def spread(self, nodes: Tensor) -> Tensor:
        """Gates of nodes -> of edges [R, S + 1]: a sender's scale its column, a query's mix it with the reference's."""
        received, sent = nodes.split([len(self.attention), len(self.columns)])
        full = torch.ones(self.graph.shape, dtype=nodes.dtype)
        columns = full.index_copy(1, torch.tensor(self.columns, dtype=torch.int64), sent.expand(len(full), -1))
        if not self.attention:
            return columns
        rows = torch.tensor(self.attention)
        if self.graph.direct_edges:
            return columns.index_put((rows, torch.tensor(self.graph.direct)), received)
        return columns.index_copy(0, rows, columns[rows] * received[:, None])

    def penalty(self, step: int) -> Tensor:
        return self.options.regularisation * hard_concrete.open_probability(self.log_alpha).mean()

    def rate(self, step: int) -> float:
        return 1.0

    def scores(self) -> np.ndarray:
        """Chance that an edge's less open end is open: float64 [R, S + 1], 0 where there is no edge."""
        graph = self.graph
        nodes = hard_concrete.open_probability(self.log_alpha.detach()).numpy()
        always = max(float(nodes.max(initial=0.0)), NATURAL)
        receivers, senders = np.full(graph.shape[0], always), np.full(graph.shape[1], always)
        receivers[self.attention] = nodes[: len(self.attention)]
        senders[self.columns] = nodes[len(self.attention) :]
        heads = [column for column, one in enumerate(graph.senders) if one.kind == "head"]
        if graph.split_qkv:
            senders[heads] = 0.0
        else:
            receivers[[row for row, one in enumerate(graph.receivers) if one.is_attention]] = 0.0
        for row, receiver in enumerate(graph.receivers):
            if receiver.kind == "mlp":
                receivers[row] = senders[graph.sender_index[Sender("mlp", receiver.layer)]]
            elif receiver.is_attention:
                for head in graph.heads_of(receiver):
                    column = graph.sender_index[Sender("head", receiver.layer, head)]
                    if graph.split_qkv:
                        senders[column] = max(senders[column], receivers[row])
                    else:
                        receivers[row] = max(receivers[row], senders[column])
        return np.where(graph.edges, np.minimum.outer(receivers, senders), 0.0)


NATURAL = float(hard_concrete.open_probability(torch.zeros((), dtype=torch.float64)))
"""Score of a node whose gate is 1/2 once trained: from there up it counts as open."""


def subnetwork_probing_scores(
    problem: Problem, options: SubnetworkProbingOptions | None = None, work: Work | None = None
) -> Scores:
    """Trains the gates; an edge's score is the chance that its less open end is open, in (0, 1).

    Raises PahqError where the metric, or its gradient, is not finite, or does not depend on the edges at all.
    """
    options, work = options or SubnetworkProbingOptions(), work or NoWork()
    setting = prepare(problem, NAME)
    mask = NodeMask(problem.graph, options)
    Training(setting, mask, options.steps, options.batch, work).run()
    values = mask.scores()
    kept = problem.graph.edges & (values >= NATURAL)
    stats = {
        **setting.stats(),
        "metric_natural": setting.circuit(kept),
        "steps": options.steps,
        "nodes": len(mask.log_alpha),
        "nodes_open": int((mask.log_alpha > 0).sum()),
        "edges_natural": int(kept.sum()),
    }
    return Scores(problem.graph, values, NAME, signed=False, natural=NATURAL, stats=stats)
