"""A circuit: which edges of a model are kept, and what each one is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from pahq.errors import PahqError
from pahq.files import naming, read_json, write_atomic, write_json
from pahq.graph import Graph
from pahq.graph.nodes import Sender
from pahq.model.config import ModelConfig

FORMAT = "pahq-circuit-1"
JSON_FILE, TENSOR_FILE = "circuit.json", "circuit.safetensors"
_TYPES = {"mask": np.bool_, "effect": np.float64, "order": np.int64}


class Edge(NamedTuple):
    """One kept edge. ``effect``: change of the metric when the edge is cut (NaN if it was never tested)."""

    sender: str
    receiver: str
    effect: float
    order: int


@dataclass(frozen=True, eq=False)
class Circuit:
    """A subset of a graph's edges, with the evidence for it.

    It holds no values for the edges that are cut: whoever runs it takes them from the prompts at hand
    (``patched_logits``); so under mean ablation the means are those of these prompts.

    mask: bool [n_receivers, n_senders + 1], True where an edge is kept; the last column is ``direct``.
    effects: float64, same shape: metric without the edge minus metric with it, NaN where untested.
    order: int64, same shape: when the edge was tested, from 0; -1 where untested.
    metadata: JSON-ready facts about how the circuit was found (model, task, options, figures).
    """

    graph: Graph
    mask: np.ndarray
    effects: np.ndarray
    order: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, array in (("mask", self.mask), ("effects", self.effects), ("order", self.order)):
            if array.shape != self.graph.shape:
                raise PahqError(
                    f"circuit: {name} has shape {list(array.shape)}, but the graph of "
                    f"{self.graph.config.name} asks for {list(self.graph.shape)}"
                )
        self.graph.check("circuit: mask", self.mask)

    @property
    def n_addition(self) -> int:
        return int(self.mask[:, : self.graph.direct].sum())

    @property
    def n_direct(self) -> int:
        return int(self.mask[:, self.graph.direct].sum())

    @property
    def n_edges(self) -> int:
        return self.n_addition + self.n_direct

    @property
    def n_tested(self) -> int:
        return int((self.order >= 0).sum())

    @property
    def is_connected(self) -> bool:
        """Whether a path leads from an embedding to the logits; if none does, the corrupted run's output comes out."""
        graph, kept = self.graph, self.mask[:, : self.graph.direct]
        reached = np.zeros(graph.direct, dtype=bool)
        reached[: 1 + graph.split_pos] = True
        for row, receiver in enumerate(graph.receivers[:-1]):
            through = self.mask[row, graph.direct] or not graph.edges[row, graph.direct]
            if through and (kept[row] & reached).any():
                heads = graph.heads_of(receiver) if receiver.is_attention else []
                fed = [Sender("head", receiver.layer, head) for head in heads] or [Sender("mlp", receiver.layer)]
                reached[[graph.sender_index[sender] for sender in fed]] = True
        return bool((kept[-1] & reached).any())

    def edges(self) -> list[Edge]:
        """The kept edges, from the output back to the input in the order in which they were tested."""
        rows, columns = np.nonzero(self.mask)
        found = [
            Edge(
                self.graph.sender_name(column),
                self.graph.receivers[row].name,
                float(self.effects[row, column]),
                int(self.order[row, column]),
            )
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        ]
        return sorted(found, key=lambda edge: edge.order)

    def largest(self, n: int = 10) -> list[Edge]:
        """The ``n`` kept edges of largest absolute effect."""
        tested = [edge for edge in self.edges() if not math.isnan(edge.effect)]
        return sorted(tested, key=lambda edge: (-abs(edge.effect), edge.order))[:n]

    def to_networkx(self) -> Any:
        """The circuit as a ``networkx.DiGraph`` from ``embed`` to ``logits``.

        Nodes are senders and receivers by name (an MLP is one node), with the attribute ``kind``. A kept direct edge
        leads from an attention input to its heads (``a1.0.q`` to ``a1.0``); where a graph has no direct edges, the
        same links are there with kind ``link``. Attributes of an edge: ``kind`` (addition, direct or link), and but
        for links ``effect`` (NaN if untested) and ``order``.
        """
        import networkx  # takes a while to import

        graph, found = self.graph, networkx.DiGraph()
        for row, receiver in enumerate(graph.receivers):
            found.add_node(receiver.name, kind=receiver.kind)
            heads = [f"a{receiver.layer}.{head}" for head in graph.heads_of(receiver)] if receiver.is_attention else []
            for column in np.flatnonzero(self.mask[row]).tolist():
                facts = {"effect": float(self.effects[row, column]), "order": int(self.order[row, column])}
                if column == graph.direct:
                    found.add_edges_from(((receiver.name, head) for head in heads), kind="direct", **facts)
                else:
                    found.add_edge(graph.sender_name(column), receiver.name, kind="addition", **facts)
            if not graph.direct_edges:
                found.add_edges_from(((receiver.name, head) for head in heads), kind="link")
        for sender in graph.senders:
            found.add_node(sender.name, kind=sender.kind)
        return found

    def to_dataframe(self, rows: str = "kept") -> Any:
        """The edges as a ``pandas.DataFrame``, one a row, in the order in which they were tested.

        rows: ``kept``, ``tested`` or ``all`` edges. Columns: sender, receiver, kind (addition or direct), input (q, k,
        v, mlp …), kept, effect (NaN if untested), order (-1 if untested). Raises PahqError where pandas is missing.
        """
        from pahq.evaluation.display import dataframe

        return dataframe(self, rows)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from pahq.evaluation.display import html

        return html(self)

    def __repr__(self) -> str:
        return (
            f"Circuit({self.graph.config.name}: {self.n_addition} of {self.graph.n_addition} addition edges, "
            f"{self.n_direct} of {self.graph.n_direct} direct edges)"
        )

    def save(self, folder: str | Path) -> None:
        """Writes ``circuit.safetensors`` and ``circuit.json`` into ``folder``, each at once.

        Raises PahqError where the folder cannot be written.
        """
        folder = Path(folder)
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        tensors = {"mask": self.mask, "effect": self.effects, "order": self.order}
        packed = safetensors.numpy.save(
            {name: np.ascontiguousarray(array, dtype=_TYPES[name]) for name, array in tensors.items()},
            metadata={"format": FORMAT},
        )
        write_atomic(folder / TENSOR_FILE, packed)
        write_json(folder / JSON_FILE, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """What ``circuit.json`` holds: how to rebuild the graph, the summary, every kept edge by name."""
        return {
            "format": FORMAT,
            **self.metadata,
            "size": {
                "addition": self.n_addition,
                "addition_total": self.graph.n_addition,
                "direct": self.n_direct,
                "direct_total": self.graph.n_direct,
                "tested": self.n_tested,
            },
            "graph": self.graph.options(),
            "architecture": self.graph.config.to_dict(),
            "edges": [
                {
                    "sender": edge.sender,
                    "receiver": edge.receiver,
                    "effect": edge.effect if math.isfinite(edge.effect) else None,
                    "order": edge.order,
                }
                for edge in self.edges()
            ],
        }

    @classmethod
    def load(cls, folder: str | Path) -> Circuit:
        """The circuit saved in ``folder``; raises PahqError for missing, damaged or disagreeing files."""
        folder = Path(folder)
        facts = read_json(folder / JSON_FILE)
        damaged = f"{folder / JSON_FILE}: the file is damaged or not a circuit"
        if facts.pop("format", None) != FORMAT:
            raise PahqError(f"{damaged} (its format is not '{FORMAT}')")
        try:
            known = {f.name for f in fields(ModelConfig)}
            architecture = facts.pop("architecture")
            graph = Graph(ModelConfig(**{k: v for k, v in architecture.items() if k in known}), **facts.pop("graph"))
            named = {(edge["sender"], edge["receiver"]) for edge in facts.pop("edges")}
            facts.pop("size")
        except (KeyError, TypeError, AttributeError) as error:
            raise PahqError(f"{damaged} ({type(error).__name__}: {error})") from error
        tensors = _read_tensors(folder / TENSOR_FILE)
        circuit = cls(graph, tensors["mask"], tensors["effect"], tensors["order"], facts)
        if named != {(edge.sender, edge.receiver) for edge in circuit.edges()}:
            raise PahqError(f"{folder}: {JSON_FILE} and {TENSOR_FILE} hold different edges; one of them was changed")
        return circuit


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """mask, effect and order from ``path``; raises PahqError if one is missing or of another type."""
    try:
        with naming(path):
            tensors = safetensors.numpy.load(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise PahqError(f"{path}: not a whole safetensors file ({error}); the file is damaged") from error
    for name, dtype in _TYPES.items():
        if name not in tensors or tensors[name].dtype != dtype:
            raise PahqError(f"{path}: has no tensor '{name}' of type {np.dtype(dtype).name}; the file is damaged")
    return tensors
