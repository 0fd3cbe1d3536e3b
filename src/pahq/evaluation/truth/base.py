"""A known circuit of a model, and where the known circuits come from.

A family of truths is a module of this folder with two functions: ``names()`` gives each truth's name and one line
about it without building anything; ``load(name)`` builds one. ``FAMILIES`` lists the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pahq.errors import PahqError, choices
from pahq.files import read_json, write_json
from pahq.graph import Graph
from pahq.model.config import ModelConfig

if TYPE_CHECKING:
    from pahq.model import Transformer
    from pahq.task import Task

FORMAT = "pahq-truth-1"
FAMILIES = ("canonical", "tracr", "trained")
"""Modules of this folder, in the order in which their truths are listed."""
INTERPBENCH = "interpbench:"
"""What goes before a case of InterpBench, or before a folder laid out like one."""
OWN = ("tracr-", "trained-", INTERPBENCH)
"""How the names of truths begin whose models have no other name."""
_SETTINGS: dict[str, type] = {"metric": str, "ablation": str, "n": int, "seed": int}


@dataclass(frozen=True, eq=False)
class Truth:
    """The circuit that a model is known to have, and the setting in which it has it.

    mask: bool [n_receivers, n_senders + 1] over ``graph``, True for the edges of the circuit.
    metric, ablation, n, seed: how a method is run on it: n prompt pairs drawn by seed.
    get_model, get_task: give the model and the prompts; None where only the edges are known.
    published: other edge sets of the same circuit by their name, of the mask's shape.
    facts: whatever else is known about it, JSON-ready (source, losses …).
    Raises PahqError for a mask that does not fit the graph.
    """

    name: str
    about: str
    graph: Graph
    mask: np.ndarray
    metric: str = "kl_div"
    ablation: str = "resample"
    n: int = 100
    seed: int = 0
    get_model: Callable[[], Transformer] | None = None
    get_task: Callable[[], Task] | None = None
    published: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, mask in (("mask", self.mask), *self.published.items()):
            self.graph.check(f"truth '{self.name}': {what}", mask)

    @property
    def n_addition(self) -> int:
        return int(self.mask[:, : self.graph.direct].sum())

    @property
    def n_direct(self) -> int:
        return int(self.mask[:, self.graph.direct].sum())

    @property
    def n_edges(self) -> int:
        return self.n_addition + self.n_direct

    def model(self) -> Transformer:
        """The model; raises PahqError where it cannot be had."""
        if self.get_model is None:
            raise PahqError(f"truth '{self.name}': no model belongs to it, only edges; name one with --model")
        return self.get_model()

    def task(self) -> Task:
        """The source of its prompts; raises PahqError where there is none."""
        if self.get_task is None:
            raise PahqError(f"truth '{self.name}': no prompts belong to it, only edges; name a task with --task")
        return self.get_task()

    def options(self) -> dict[str, Any]:
        """How a search is to be run on it, as keyword arguments of ``pahq.discover``: metric, ablation, graph …"""
        return {name: getattr(self, name) for name in _SETTINGS} | self.graph.options()

    def edge_names(self, mask: np.ndarray | None = None) -> list[str]:
        """Names of the truth's edges, or of those of another mask of its graph, receiver by receiver."""
        return names_of(self.graph, self.mask if mask is None else mask)

    def on(self, graph: Graph) -> np.ndarray:
        """The truth as a mask of ``graph``, another view of the same model: bool ``graph.shape``.

        Joint q/k/v receivers read what any of the three reads; without direct edges those are left out; where the
        position embedding is no sender of its own, its edges are the embedding's. Raises PahqError for another
        architecture, and for a graph that tells more edges apart than the truth does.
        """
        return moved(self.graph, self.mask, graph, f"truth '{self.name}'")

    def to_json(self) -> dict[str, Any]:
        """What ``read_truth`` takes: the graph, and the edges by name."""
        return {
            "format": FORMAT,
            "name": self.name,
            "about": self.about,
            **{name: getattr(self, name) for name in _SETTINGS},
            "graph": self.graph.options(),
            "architecture": self.graph.config.to_dict(),
            "edges": self.edge_names(),
            "published": {name: self.edge_names(mask) for name, mask in self.published.items()},
            "facts": dict(self.facts),
        }

    def save(self, path: str | Path) -> None:
        """Writes ``to_json`` at once; raises PahqError where that cannot be done."""
        write_json(Path(path), self.to_json())


def check_reader(task: str, model: Transformer) -> None:
    """Raises PahqError for a model that reads text: to it the token numbers of such a task mean something else."""
    if model.tokenizer is not None:
        raise PahqError(
            f"task '{task}': its prompts are token numbers of its own model, not of {model.config.name}; "
            f"take model {task}"
        )


def names_of(graph: Graph, mask: np.ndarray) -> list[str]:
    """Names of the edges in a mask, receiver by receiver in the order of computation."""
    return [graph.edge_name(int(row), int(column)) for row, column in np.argwhere(mask)]


def mask_of(graph: Graph, names: Iterable[str]) -> np.ndarray:
    """bool [n_receivers, n_senders + 1] from edges such as ``m0->a1.0.q``; PahqError for one that the graph lacks."""
    mask = np.zeros(graph.shape, dtype=bool)
    for name in names:
        mask[graph.edge(name)] = True
    return mask


def node_names(graph: Graph) -> list[str]:
    """The nodes of ``node_mask``: senders, then receivers; an MLP's input is told from its output as ``m0.in``."""
    receivers = [f"{r.name}.in" if r.kind == "mlp" else r.name for r in graph.receivers]
    return [sender.name for sender in graph.senders] + receivers


def node_mask(graph: Graph, mask: np.ndarray) -> np.ndarray:
    """The nodes of a set of edges, bool [n_senders + n_receivers]: the end points of the edges that are present.

    A receiver of attention and the query, key or value computed from it are one node, so that a direct edge has one
    end point. Source: Conmy et al. 2023, section 4.2 and its code.
    """
    if mask.shape != graph.shape:
        raise PahqError(
            f"nodes: a mask of shape {list(mask.shape)} does not fit {graph.config.name}'s {list(graph.shape)}"
        )
    return np.concatenate([mask[:, : graph.direct].any(axis=0), mask.any(axis=1)])


def moved(old: Graph, mask: np.ndarray, new: Graph, what: str = "circuit") -> np.ndarray:
    """A mask of ``old`` as one of ``new``; see ``Truth.on``."""
    sizes = ("n_layers", "n_heads", "n_kv_heads", "parallel")
    for name in (*sizes, "d_mlp"):
        here, there = (getattr(graph.config, name) for graph in (old, new))
        if (bool(here) != bool(there)) if name == "d_mlp" else here != there:
            raise PahqError(
                f"{what}: it is about a model with {name}={here}, but {new.config.name} has {there}; "
                "compare circuits of one model"
            )
    for option in ("split_qkv", "direct_edges", "split_pos"):
        if getattr(new, option) and not getattr(old, option):
            raise PahqError(
                f"{what}: it does not tell apart what {option} does; search with {option} off to compare with it"
            )
    out = np.zeros(new.shape, dtype=bool)
    for row, column in np.argwhere(mask):
        receiver, sender = old.receivers[row].name, old.sender_name(int(column))
        if not new.split_qkv and old.receivers[row].kind in ("q", "k", "v"):
            at = old.receivers[row]
            group = at.index // old.config.group_size if at.kind == "q" else at.index
            receiver = f"a{at.layer}.{group}.qkv"
        if sender == "pos_embed" and not new.split_pos:
            sender = "embed"
        if column == old.direct and not new.direct_edges:
            continue
        out[new.edge(f"{sender}->{receiver}")] = True
    return out


def truth_names() -> dict[str, str]:
    """Every truth that ``load_truth`` knows by name, with one line about it. Nothing is built or downloaded."""
    return {name: about for family in FAMILIES for name, about in _family(family).names().items()}


def load_truth(name: str, graph: Graph | None = None) -> Truth:
    """The truth ``name``: one of ``truth_names``, ``interpbench:CASE``, or a JSON file (see ``read_truth``).

    graph: what a file's edges are about if it does not say so itself. Raises PahqError for an unknown name.
    """
    if name.startswith(INTERPBENCH):
        return _family("interpbench").load(name.removeprefix(INTERPBENCH))
    for family in FAMILIES:
        if name in _family(family).names():
            return _family(family).load(name)
    if name.endswith(".json"):
        return read_truth(Path(name), graph)
    hint = choices(name, truth_names(), "choose one of")
    raise PahqError(f"truth '{name}' is unknown; {hint} (or give {INTERPBENCH}CASE, or a .json file of edges)")


def read_truth(path: Path, graph: Graph | None = None) -> Truth:
    """A truth from a JSON file: what ``Truth.save`` wrote, a run's ``circuit.json``, or ``{"edges": [...]}`` alone.

    Edges are names such as ``m0->a1.0.q`` and ``direct->a1.0.q``, or objects with ``sender`` and ``receiver``.
    graph: needed where the file does not describe one. Raises PahqError for what is missing or damaged.
    """
    facts = read_json(path)
    edges = facts.get("edges")
    if not isinstance(edges, list):
        raise PahqError(f"{path}: it has no list 'edges'; write the edges there, such as 'm0->a1.0.q'")
    own = _graph_of(facts, path)
    if own is None and graph is None:
        raise PahqError(f"{path}: it does not say which model its edges are about; add 'architecture' and 'graph'")
    at = own if own is not None else graph
    assert at is not None
    published = facts.get("published", {})
    if not isinstance(published, dict) or not isinstance(facts.get("facts", {}), dict):
        raise PahqError(f"{path}: 'published' and 'facts' must be objects; the file is damaged")
    for name, kind in _SETTINGS.items():
        if name in facts and type(facts[name]) is not kind:
            raise PahqError(f"{path}: {name} is {facts[name]!r}; give a value of type {kind.__name__}")
    return Truth(
        name=str(facts.get("name", path.stem)),
        about=str(facts.get("about", f"edges of {path.name}")),
        graph=at,
        mask=mask_of(at, (_edge_name(edge, path) for edge in edges)),
        published={
            str(name): mask_of(at, (_edge_name(edge, path) for edge in part)) for name, part in published.items()
        },
        facts=facts.get("facts", {}),
        **{name: facts[name] for name in _SETTINGS if name in facts},
    )


def _graph_of(facts: Mapping[str, Any], path: Path) -> Graph | None:
    if "architecture" not in facts:
        return None
    known = {f.name for f in fields(ModelConfig)}
    try:
        architecture = {name: value for name, value in facts["architecture"].items() if name in known}
        return Graph(ModelConfig(**architecture), **facts.get("graph", {}))
    except (TypeError, AttributeError) as error:
        raise PahqError(f"{path}: its architecture or graph cannot be read ({error}); the file is damaged") from error


def _edge_name(edge: Any, path: Path) -> str:
    if isinstance(edge, str):
        return edge
    if isinstance(edge, dict) and isinstance(edge.get("sender"), str) and isinstance(edge.get("receiver"), str):
        return f"{edge['sender']}->{edge['receiver']}"
    raise PahqError(f"{path}: {edge!r} is no edge; write it like 'm0->a1.0.q'")


def _family(name: str) -> Any:
    return import_module(f"pahq.evaluation.truth.{name}")
