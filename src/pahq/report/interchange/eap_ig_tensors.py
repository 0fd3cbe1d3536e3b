"""EAP-IG's graphs and MIB's importances as tensors (``importances.pt``).

A dictionary saved by torch: ``cfg``, ``src_nodes``, ``dst_nodes``, ``edges_scores`` float [n_src, n_dst],
``edges_in_graph`` bool [n_src, n_dst], ``nodes_in_graph`` bool [n_src]. It is read with torch's loader for tensors
alone, which runs nothing that a file may hold. Source: Hanna et al. 2024, Mueller et al. 2025.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.files import write_atomic
from pahq.graph import Graph
from pahq.report.interchange import eap_ig
from pahq.report.interchange.files import File
from pahq.report.interchange.links import Reading


def matches(file: File) -> bool:
    return file.is_zip


def read(file: File, graph: Graph | None) -> Reading:
    """graph: whose circuit it is to be; None: a model of ``cfg``'s size, with MLPs and without direct edges."""
    import torch

    where = str(file.path)
    try:
        facts = torch.load(io.BytesIO(file.data), map_location="cpu", weights_only=True)
    except Exception as error:  # the loader has many kinds of refusals
        raise PahqError(
            f"{where}: torch's loader for tensors alone refuses it ({type(error).__name__}); give a whole file of "
            "tensors, or the .json of the same graph"
        ) from None
    needed = {"cfg", "src_nodes", "dst_nodes", "edges_in_graph"}
    if not isinstance(facts, dict) or needed - set(facts):
        raise PahqError(f"{where}: no EAP-IG graph; it has {', '.join(sorted(needed))}")
    kept, scores = facts["edges_in_graph"], facts.get("edges_scores")
    shape = [len(facts["src_nodes"]), len(facts["dst_nodes"])]
    for name, tensor in (("edges_in_graph", kept), ("edges_scores", scores)):
        if tensor is not None and (not isinstance(tensor, torch.Tensor) or list(tensor.shape) != shape):
            raise PahqError(f"{where}: {name} does not fit the nodes' {shape}; the file is damaged")
    real = real_edges(facts["cfg"], where)
    as_json: dict[str, Any] = {"cfg": dict(facts["cfg"]), "nodes": {}, "edges": {}}
    strays = 0
    for row, sender in enumerate(facts["src_nodes"]):
        marks = kept[row].bool().tolist()
        values = [None] * shape[1] if scores is None else scores[row].double().tolist()
        for column, receiver in enumerate(facts["dst_nodes"]):
            if (sender, receiver) in real:
                as_json["edges"][f"{sender}->{receiver}"] = {"in_graph": marks[column], "score": values[column]}
            else:
                strays += marks[column]
    for row, sender in enumerate(facts["src_nodes"]):
        as_json["nodes"][sender] = {"in_graph": bool(facts["nodes_in_graph"][row])} if "nodes_in_graph" in facts else {}
        if "nodes_scores" in facts:
            as_json["nodes"][sender]["score"] = float(facts["nodes_scores"][row])
        if "neurons_in_graph" in facts or "neurons_scores" in facts:
            as_json["nodes"][sender]["neurons"] = True
    if "nodes_in_graph" not in facts:
        as_json["nodes"] = {}
    if graph is not None and not graph.config.d_mlp:  # such files have places for MLPs even so
        as_json["edges"] = {n: e for n, e in as_json["edges"].items() if "m" not in n or e["in_graph"] or e["score"]}
        as_json["nodes"] = {n: e for n, e in as_json["nodes"].items() if not n.startswith("m") or e.get("in_graph")}
    found = eap_ig.read_facts(as_json, file.path, graph)
    lost = (f"{strays:,} marks in places that are no edges",) if strays else ()
    return Reading(found.circuit, (*found.lost, *lost))


def write(circuit: Circuit, path: Path) -> list[str]:
    """Writes the graph; returns what it could not hold, one line each."""
    import torch

    cfg = eap_ig.config_of(circuit.graph)
    sources, targets = nodes_of(cfg)
    rows, columns = ({name: i for i, name in enumerate(names)} for names in (sources, targets))
    scores = torch.zeros(len(sources), len(targets), dtype=torch.float64)  # so that nothing is rounded
    kept = torch.zeros(len(sources), len(targets), dtype=torch.bool)
    for link in eap_ig.joined(circuit):
        at = rows[eap_ig.theirs(link.sender)], columns[eap_ig.theirs(link.receiver)]
        kept[at] = link.kept
        scores[at] = 0.0 if math.isnan(link.effect) else link.effect
    within = eap_ig.nodes_within(circuit)
    facts = {
        "cfg": cfg,
        "src_nodes": sources,
        "dst_nodes": targets,
        "edges_scores": scores,
        "edges_in_graph": kept,
        "nodes_in_graph": torch.tensor([within.get(eap_ig.node_name(name), False) for name in sources]),
    }
    buffer = io.BytesIO()
    torch.save(facts, buffer)
    write_atomic(path, buffer.getvalue())
    no_mlps = [] if circuit.graph.config.d_mlp else ["that the model has no MLPs: there are empty places for them"]
    return [*eap_ig.unheld(circuit), *no_mlps]


def nodes_of(cfg: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the rows (senders) and columns (receivers) of the format's tensors, for a model of these sizes."""
    sources, targets = ["input"], []
    for layer in range(cfg["n_layers"]):
        heads = [f"a{layer}.h{head}" for head in range(cfg["n_heads"])]
        sources += [*heads, f"m{layer}"]
        targets += [f"{head}<{kind}>" for kind in "qkv" for head in heads] + [f"m{layer}"]
    return sources, [*targets, "logits"]


def real_edges(cfg: Any, where: str) -> set[tuple[str, str]]:
    """The pairs of names that are edges of a model of these sizes; raises PahqError for sizes that cannot be."""
    graph = eap_ig.graph_of(cfg if isinstance(cfg, dict) else {}, True, Path(where))
    names = [eap_ig.theirs(sender.name) for sender in graph.senders]
    return {
        (name, eap_ig.theirs(receiver.name))
        for row, receiver in enumerate(graph.receivers)
        for name in names[: int(graph.edges[row].sum())]
    }
