"""EAP-IG's graphs, and MIB's importance files, which are the same: ``importances.json`` and ``importances.pt``.

``{"cfg": {n_layers, n_heads, parallel_attn_mlp, d_model}, "nodes": {"a0.h1": {"in_graph": …}}, "edges":
{"a0.h1->m3": {"score": …, "in_graph": …}}}``; an edge into a head says which input: ``m0->a1.h2<q>``. A score is what
our effects are: the loss with the edge ablated less the loss with it. Source: Hanna et al. 2024, Mueller et al. 2025.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.files import write_atomic
from pahq.graph import DIRECT, Graph
from pahq.report.interchange.files import File
from pahq.report.interchange.links import Link, Reading, about, coarse, fold, unfold, unknown_model

_EDGE = re.compile(r"(input|m\d+|a\d+\.h\d+)->(logits|m\d+|a\d+\.h\d+<[qkv]>)")
_NODE = re.compile(r"input|logits|m\d+|a\d+\.h\d+")
_HEAD = re.compile(r"(a\d+)\.h?(\d+)")
_TOLD = ("n_layers", "n_heads", "parallel_attn_mlp", "d_model")


def matches(file: File) -> bool:
    return isinstance(file.json, dict) and {"cfg", "edges"} <= set(file.json)


def read(file: File, graph: Graph | None) -> Reading:
    """graph: whose circuit it is to be; None: a model of ``cfg``'s size without direct edges."""
    if not matches(file):
        raise PahqError(f"{file.path}: no EAP-IG graph; it has objects 'cfg', 'nodes' and 'edges'")
    return read_facts(file.json, file.path, graph)


def read_facts(facts: dict[str, Any], path: Path, graph: Graph | None) -> Reading:
    """``read`` from what ``importances.json`` holds; path: for messages."""
    where = str(path)
    if not isinstance(facts["edges"], dict) or not isinstance(facts["cfg"], dict):
        raise PahqError(f"{where}: no EAP-IG graph; it has objects 'cfg', 'nodes' and 'edges'")
    nodes = facts.get("nodes", {})
    if not isinstance(nodes, dict):
        raise PahqError(f"{where}: 'nodes' is a {type(nodes).__name__}; give an object with a node's name for each key")
    links = []
    for name, value in facts["edges"].items():
        value = value if isinstance(value, dict) else {"in_graph": value}
        if not isinstance(value.get("in_graph"), bool):
            raise PahqError(f"{where}: edge '{name}' has in_graph {value.get('in_graph')!r}; give true or false")
        links.append(_link(name, value["in_graph"], value.get("score"), where))
    for name in nodes:
        if not _NODE.fullmatch(name):
            raise PahqError(f"{where}: '{name}' is no node; nodes are input, a0.h1, m0 and logits")
    mlps = any(name.startswith("m") for name in nodes) or any(link.receiver.startswith("m") for link in links)
    found = fold(links, graph_of(facts["cfg"], mlps, path) if graph is None else graph, where)
    lost = [*found.lost, *_unheld(facts, found.circuit)]
    missing = found.circuit.graph.n_addition - _named(links, found.circuit.graph)
    if missing:
        lost.append(f"nothing is there about {missing:,} edges: they are taken as absent and untested")
    return Reading(found.circuit, tuple(lost))


def write(circuit: Circuit, path: Path) -> list[str]:
    """Writes the graph; returns what it could not hold, one line each."""
    edges = {
        f"{theirs(link.sender)}->{theirs(link.receiver)}": {"score": _score(link.effect), "in_graph": link.kept}
        for link in joined(circuit)
    }
    graph = circuit.graph
    within = nodes_within(circuit)
    nodes = {"input": {"in_graph": within["embed"]}}
    for sender in graph.senders:
        if sender.layer >= 0:
            nodes[theirs(sender.name)] = {"in_graph": within[sender.name]}
    nodes["logits"] = {"in_graph": True}
    text = json.dumps({"cfg": config_of(graph), "nodes": nodes, "edges": edges}, allow_nan=False)
    write_atomic(path, text.encode())
    return unheld(circuit)


def joined(circuit: Circuit) -> list[Link]:
    """The addition edges by head, those of the position embedding joined with the embedding's."""
    links = (link for link in unfold(circuit) if link.sender != DIRECT)
    if not circuit.graph.split_pos:
        return list(links)
    found: dict[str, Link] = {}
    for link in links:
        link = link._replace(sender="embed") if link.sender == "pos_embed" else link
        before = found.get(link.name)
        if before is None:
            found[link.name] = link
        else:
            effect = max(before.effect, link.effect, key=lambda value: -1.0 if math.isnan(value) else abs(value))
            found[link.name] = link._replace(kept=before.kept or link.kept, effect=effect)
    return list(found.values())


def nodes_within(circuit: Circuit) -> dict[str, bool]:
    """Senders by name: whether a kept edge leads out of each, and (but for embeddings) one into it."""
    graph = circuit.graph
    out = np.flatnonzero(circuit.mask[:, : graph.direct].any(axis=0)).tolist()
    reads: set[str] = set()
    for row, receiver in enumerate(graph.receivers):
        if circuit.mask[row, : graph.direct].any():
            heads = graph.heads_of(receiver) if receiver.is_attention else ()
            reads |= {f"a{receiver.layer}.{head}" for head in heads} or {receiver.name}
    within = {s.name: i in out and (s.layer < 0 or s.name in reads) for i, s in enumerate(graph.senders)}
    within["embed"] |= within.get("pos_embed", False)
    return within


def config_of(graph: Graph) -> dict[str, Any]:
    cfg = graph.config
    return dict(zip(_TOLD, (cfg.n_layers, cfg.n_heads, cfg.parallel, cfg.d_model), strict=True))


def unheld(circuit: Circuit) -> list[str]:
    """What a circuit has that the format has no place for."""
    graph, lost = circuit.graph, []
    if graph.direct_edges:
        lost.append(f"direct edges ({circuit.n_direct:,} kept of {graph.n_direct:,}, and their effects)")
    if circuit.n_tested:
        lost.append(f"the order in which {circuit.n_tested:,} edges were tested")
    untested = int(np.isnan(circuit.effects[:, : graph.direct][graph.edges[:, : graph.direct]]).sum())
    if untested:
        lost.append(f"that {untested:,} edges have no effect on record: they get score 0")
    if graph.split_pos:
        lost.append("the position embedding as a sender of its own: its edges are the input's")
    there = sum(link.kept for link in joined(circuit))
    return (
        lost
        + coarse(graph, circuit.n_addition, there)
        + about(circuit, "layers, heads, width and whether MLPs are parallel")
    )


def node_name(name: str) -> str:
    """``a0.h1`` -> ``a0.1``, ``input`` -> ``embed``."""
    return "embed" if name == "input" else _HEAD.sub(r"\1.\2", name)


def theirs(name: str) -> str:
    """``a0.1.q`` -> ``a0.h1<q>``, ``a0.1`` -> ``a0.h1``, ``embed`` -> ``input``."""
    if name == "embed":
        return "input"
    head, dot, kind = name.rpartition(".")
    if kind in ("q", "k", "v") and dot:
        return f"{theirs(head)}<{kind}>"
    return _HEAD.sub(r"\1.h\2", name)


def _link(name: str, kept: bool, score: Any, where: str) -> Link:
    found = _EDGE.fullmatch(name)
    if found is None:
        raise PahqError(f"{where}: '{name}' is no edge; edges are named like a0.h1->m3 or m0->a1.h2<q>")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise PahqError(f"{where}: edge '{name}' has score {score!r}; give a number")
    receiver = re.sub(r"<([qkv])>$", r".\1", found[2])
    return Link(node_name(found[1]), node_name(receiver), kept, math.nan if score is None else float(score))


def _score(effect: float) -> float:
    return 0.0 if math.isnan(effect) else effect


def graph_of(cfg: dict[str, Any], mlps: bool, path: Path) -> Graph:
    """The graph of a model of ``cfg``'s sizes, without direct edges; raises PahqError for sizes that cannot be."""
    for name in ("n_layers", "n_heads"):
        if type(cfg.get(name)) is not int or cfg[name] < 1:
            raise PahqError(f"{path}: cfg has {name} {cfg.get(name)!r}; give a whole number of at least 1")
    width = cfg.get("d_model")
    width = width if type(width) is int and width > 0 else 1
    parallel = bool(cfg.get("parallel_attn_mlp", False))
    config = unknown_model(path.stem, cfg["n_layers"], cfg["n_heads"], mlps, parallel, width)
    return Graph(config, direct_edges=False)


def _named(links: Iterable[Link], graph: Graph) -> int:
    """How many addition edges of the graph the links name."""
    marked = fold((link._replace(kept=True) for link in links), graph, "").circuit
    return marked.n_addition


def _unheld(facts: dict[str, Any], circuit: Circuit) -> Iterator[str]:
    """What a file has that a circuit has no place for."""
    nodes: dict[str, Any] = facts.get("nodes", {})
    if any(isinstance(value, dict) and "score" in value for value in nodes.values()):
        yield "scores of nodes"
    if any(isinstance(value, dict) and {"neurons", "neurons_scores"} & set(value) for value in nodes.values()):
        yield "neurons and their scores"
    within = nodes_within(circuit) | {"logits": True}
    told = {node_name(n): v.get("in_graph") if isinstance(v, dict) else v for n, v in nodes.items()}
    odd = sum(name in within and bool(value) != within[name] for name, value in told.items())
    if odd:
        yield f"in_graph of {odd:,} nodes that does not follow from their edges"
    others = [name for name in facts["cfg"] if name not in _TOLD]
    if others:
        yield f"of cfg: {', '.join(others)}"
    more = [name for name in facts if name not in ("cfg", "nodes", "edges")]
    if more:
        yield f"also in the file: {', '.join(more)}"
