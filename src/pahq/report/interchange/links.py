"""Edges by head, which is how the formats of others name them, and the way from and to a circuit of ours.

Ours may be coarser: groups of keys and values, joint q/k/v inputs, one embedding. ``unfold`` writes such an edge once
for each head and input; ``fold`` brings the links together again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.graph import DIRECT, Graph, Receiver
from pahq.model.config import ModelConfig

UNKNOWN = "unknown"
"""``ModelConfig.architecture`` of a model of which only the edges are known; sizes that edges do not tell are 1."""


class Link(NamedTuple):
    """sender: embed, pos_embed, a1.0, m0 or direct; receiver: a1.0.q (by head, also for k and v), m0 or logits.

    effect: NaN where unknown; order: -1 where unknown.
    """

    sender: str
    receiver: str
    kept: bool
    effect: float = math.nan
    order: int = -1

    @property
    def name(self) -> str:
        return f"{self.sender}->{self.receiver}"


@dataclass(frozen=True)
class Reading:
    """What a file gave. lost: what it holds, or lacks, that a circuit has no place for, one line each."""

    circuit: Circuit
    lost: tuple[str, ...] = ()


def by_head(graph: Graph, receiver: Receiver) -> list[str]:
    """A receiver's names by head: ``a0.1.qkv`` is q, k and v of all heads of group 1."""
    if not receiver.is_attention:
        return [receiver.name]
    kinds = "qkv" if receiver.kind == "qkv" else receiver.kind
    return [f"a{receiver.layer}.{head}.{kind}" for kind in kinds for head in graph.heads_of(receiver)]


def unfold(circuit: Circuit) -> Iterator[Link]:
    """Every edge of the graph, kept or not, as links by head: receiver by receiver, senders in order."""
    graph = circuit.graph
    senders = [*(sender.name for sender in graph.senders), DIRECT]
    for row, receiver in enumerate(graph.receivers):
        columns = np.flatnonzero(graph.edges[row]).tolist()
        for name in by_head(graph, receiver):
            for column in columns:
                at = row, column
                yield Link(
                    senders[column], name, bool(circuit.mask[at]), float(circuit.effects[at]), int(circuit.order[at])
                )


def fold(links: Iterable[Link], graph: Graph, where: str, metadata: dict[str, Any] | None = None) -> Reading:
    """A circuit of ``graph`` from links; edges that no link names are absent and untested.

    Where several links are one edge, it is kept if any is, and has the effect of largest size and the first order;
    ``lost`` says how many differed. where: the file's name, for messages.
    Raises PahqError for a link that the graph has no edge for.
    """
    columns = {sender.name: column for column, sender in enumerate(graph.senders)}
    if not graph.split_pos:
        columns["pos_embed"] = columns["embed"]
    rows = {name: row for row, receiver in enumerate(graph.receivers) for name in by_head(graph, receiver)}
    mask = np.zeros(graph.shape, dtype=bool)
    effects, order = np.full(graph.shape, np.nan), np.full(graph.shape, -1)
    seen: set[tuple[int, int]] = set()
    differ: set[tuple[int, int]] = set()
    direct = kept_direct = 0
    for link in links:
        if link.sender == DIRECT and not graph.direct_edges and link.receiver in rows:
            direct, kept_direct = direct + 1, kept_direct + link.kept
            continue
        at = rows.get(link.receiver, -1), graph.direct if link.sender == DIRECT else columns.get(link.sender, -1)
        if min(at) < 0 or not graph.edges[at]:
            raise PahqError(f"{where}: there is no edge {link.name} in {graph.config.name}; give the model it is about")
        if at not in seen:
            seen.add(at)
            mask[at], effects[at], order[at] = link.kept, link.effect, link.order
            continue
        same = link.effect == effects[at] or (math.isnan(link.effect) and math.isnan(effects[at]))
        if not same or link.kept != mask[at] or link.order != order[at]:
            differ.add(at)
        mask[at] |= link.kept
        if math.isnan(effects[at]) or abs(link.effect) > abs(effects[at]):
            effects[at] = link.effect
        if link.order >= 0 and not 0 <= order[at] <= link.order:
            order[at] = link.order
    lost = []
    if direct:
        lost.append(f"direct edges ({kept_direct:,} kept of {direct:,}): the graph asked for has none")
    if differ:
        lost.append(
            f"what tells apart heads or inputs that are one in the graph asked for: {len(differ):,} edges joined "
            "(kept if any is, with the effect of largest size)"
        )
    return Reading(Circuit(graph, mask, effects, order, metadata or {}), tuple(lost))


def unknown_model(name: str, n_layers: int, n_heads: int, mlps: bool, parallel: bool, d_model: int = 1) -> ModelConfig:
    """The configuration of a model of which little more than the edges is known; raises PahqError for sizes below 1."""
    return ModelConfig(
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_model=d_model,
        d_head=1,
        d_mlp=int(mlps),
        d_vocab=1,
        d_vocab_out=1,
        n_ctx=1,
        parallel=parallel,
        name=name,
        architecture=UNKNOWN,
    )


def coarse(graph: Graph, kept: int, there: int) -> list[str]:
    """What of a graph's own kinds of edges is lost in files that name edges by head.

    kept, there: edges of the circuit, of the kinds that the file has, and how many they are by head.
    """
    lost = []
    if not graph.split_qkv:
        lost.append("joint q/k/v inputs: each is written as q, k and v")
    if graph.config.group_size > 1:
        lost.append(
            f"groups of keys and values: each of the {graph.config.n_kv_heads} a layer is written for its "
            f"{graph.config.group_size} heads, so that {kept:,} edges are {there:,} there (to read them back as they "
            "were: --like RUN)"
        )
    return lost


def groups_unsaid(circuit: Circuit) -> list[str]:
    """What to say where the heads of a circuit read by head share keys and values, as far as its edges show.

    The heads of a group then have the same edges with the same effects; the largest size of groups is taken.
    """
    graph, n_heads = circuit.graph, circuit.graph.config.n_heads
    inputs: dict[tuple[int, str], list[int]] = {}
    for row, receiver in enumerate(graph.receivers):
        if receiver.kind in ("k", "v"):
            inputs.setdefault((receiver.layer, receiver.kind), []).append(row)
    rows = np.array(list(inputs.values()))
    if graph.config.group_size > 1 or not rows.size or not circuit.mask[rows].any():
        return []
    effects, mask = np.nan_to_num(circuit.effects)[rows], circuit.mask[rows]
    for size in range(n_heads, 1, -1):
        shape = len(rows), n_heads // size, size, -1
        if n_heads % size == 0 and all(
            (part == part[:, :, :1]).all() for part in (effects.reshape(shape), mask.reshape(shape))
        ):
            whole = circuit.n_edges - int(mask.sum()) * (size - 1) // size
            return [
                f"each {size} heads have the same keys and values, likely those of a group: the {whole:,} edges "
                f"with groups are {circuit.n_edges:,} by head (join them: --like RUN or --model NAME)"
            ]
    return []


def about(circuit: Circuit, told: str) -> list[str]:
    """What files of edges have no place for: how a circuit was found, and most of the model's architecture.

    told: what of the architecture the file does tell.
    """
    lost = []
    if circuit.metadata:
        lost.append(f"how the circuit was found ({', '.join(circuit.metadata)})")
    if circuit.graph.config.architecture != UNKNOWN:
        lost.append(f"the model's architecture but for {told}")
    return lost
