"""Our own circuits: a run's or a converted folder, its ``circuit.json`` alone, or a file of a known circuit."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from pahq.errors import PahqError
from pahq.evaluation.circuit import FORMAT, JSON_FILE, TENSOR_FILE, Circuit
from pahq.evaluation.truth.base import FORMAT as TRUTH_FORMAT
from pahq.evaluation.truth.base import read_truth
from pahq.graph import Graph
from pahq.report.interchange.files import File
from pahq.report.interchange.links import Reading, fold, unfold


def matches(file: File) -> bool:
    if file.is_folder:
        return (file.path / JSON_FILE).exists()
    return isinstance(file.json, dict) and file.json.get("format") in (FORMAT, TRUTH_FORMAT)


def read(file: File, graph: Graph | None) -> Reading:
    """graph: whose circuit it is to be, another view of the same model; None: its own."""
    if file.is_folder and not matches(file):
        raise PahqError(f"{file.path}: there is no circuit in it ({JSON_FILE} is missing); give a finished run")
    found = _read(file)
    if graph is None:
        return found
    folded = fold(unfold(found.circuit), graph, str(file.path), found.circuit.metadata)
    return Reading(folded.circuit, (*found.lost, *folded.lost))


def _read(file: File) -> Reading:
    folder = file.path if file.is_folder else file.path.parent
    if file.is_folder or (file.path.name == JSON_FILE and (folder / TENSOR_FILE).exists()):
        return Reading(Circuit.load(folder))
    if not isinstance(file.json, dict):
        raise PahqError(f"{file.path}: no circuit; give the folder of a finished run, or its {JSON_FILE}")
    truth = read_truth(file.path)  # judges graph and edges
    facts = {
        f"{edge['sender']}->{edge['receiver']}": edge
        for edge in file.json["edges"]
        if isinstance(edge, dict) and {"sender", "receiver"} <= set(edge)
    }
    links = []
    for name in truth.edge_names():
        edge = facts.get(name, {})
        effect, order = edge.get("effect"), edge.get("order", -1)
        if not isinstance(effect, int | float | None) or type(order) is not int:
            raise PahqError(f"{file.path}: edge {name} has effect {effect!r} and order {order!r}; the file is damaged")
        sender, _, receiver = name.partition("->")
        links.append((sender, receiver, math.nan if effect is None else float(effect), order))
    circuit = Circuit(truth.graph, *_arrays(truth.graph, links))
    lost = []
    if file.json.get("format") == FORMAT:
        lost.append(f"nothing is there about the edges that were removed: {TENSOR_FILE} is not beside it")
    if truth.published:
        lost.append(f"other sets of edges: {', '.join(truth.published)}")
    if truth.facts:
        lost.append(f"facts: {', '.join(truth.facts)}")
    return Reading(circuit, tuple(lost))


def write(circuit: Circuit, path: Path) -> list[str]:
    """Writes a folder with ``circuit.json`` and ``circuit.safetensors``, which hold everything."""
    circuit.save(path)
    return []


def _arrays(graph: Graph, edges: list[tuple[str, str, float, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mask = np.zeros(graph.shape, dtype=bool)
    effects, order = np.full(graph.shape, np.nan), np.full(graph.shape, -1)
    for sender, receiver, effect, when in edges:
        at = graph.edge(f"{sender}->{receiver}")
        mask[at], effects[at], order[at] = True, effect, when
    return mask, effects, order
