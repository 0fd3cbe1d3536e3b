"""Circuits that people found by hand, as edge sets, rebuilt from the groups of heads in their papers.

The sets are those that Conmy et al. 2023 (appendices E to G) held ACDC's results against. When a head is in a
circuit, so are the direct edges of those of its inputs that are in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pahq.evaluation.truth.base import Truth, mask_of
from pahq.graph import DIRECT, Graph
from pahq.model.config import ModelConfig

if TYPE_CHECKING:
    from pahq.model import Transformer
    from pahq.task import Task

GPT2_SMALL = ModelConfig(
    n_layers=12,
    n_heads=12,
    n_kv_heads=12,
    d_model=768,
    d_head=64,
    d_mlp=3072,
    d_vocab=50257,
    d_vocab_out=50257,
    n_ctx=1024,
    name="gpt2",
    architecture="gpt2",
)
ATTN_ONLY_4L = ModelConfig(
    n_layers=4,
    n_heads=8,
    n_kv_heads=8,
    d_model=512,
    d_head=64,
    d_mlp=0,
    d_vocab=48262,
    d_vocab_out=48262,
    n_ctx=1024,
    name="attn-only-4l",
    architecture="transformer-lens",
)

NAME_MOVERS = ("a9.9", "a10.0", "a9.6")
BACKUPS = ("a10.10", "a10.6", "a10.2", "a10.1", "a11.2", "a9.7", "a9.0", "a11.9")
NEGATIVE = ("a10.7", "a11.10")
S_INHIBITION = ("a7.3", "a7.9", "a8.6", "a8.10")
INDUCTION = ("a5.5", "a5.8", "a5.9", "a6.9")
DUPLICATE = ("a0.1", "a0.10", "a3.0")
PREVIOUS = ("a2.2", "a4.11")


class _Edges:
    """Collects edges between groups of nodes; those that do not exist (backwards in the forward pass) are left out."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.columns = {sender.name: column for column, sender in enumerate(graph.senders)} | {DIRECT: graph.direct}
        self.rows = {receiver.name: row for row, receiver in enumerate(graph.receivers)}
        self.mask = np.zeros(graph.shape, dtype=bool)

    def add(self, senders: Iterable[str], nodes: Sequence[str], inputs: str = "qkv") -> None:
        """Edges from each sender to each node; of a head, to the inputs named."""
        receivers = [f"{node}.{i}" for node in nodes if node.startswith("a") for i in inputs]
        receivers += [node for node in nodes if not node.startswith("a")]
        for sender in senders:
            for receiver in receivers:
                at = self.rows[receiver], self.columns[sender]
                self.mask[at] |= self.graph.edges[at]


def ioi(graph: Graph) -> np.ndarray:
    """Indirect object identification in GPT-2 small: bool [n_receivers, n_senders + 1]. Wang et al. 2022.

    MLPs, which that paper leaves as they are, belong to the circuit with all their edges.
    """
    edges = _Edges(graph)
    mlps = _mlps(range(graph.config.n_layers))
    heads = (*NAME_MOVERS, *BACKUPS, *NEGATIVE, *S_INHIBITION, *INDUCTION, *DUPLICATE, *PREVIOUS)
    edges.add(["embed", *mlps], [*mlps, "logits"])
    edges.add(mlps, heads)
    edges.add(heads, mlps)
    edges.add([DIRECT], heads)
    for nodes, inputs in (
        (PREVIOUS, "qkv"),
        (DUPLICATE, "qkv"),
        (S_INHIBITION, "q"),
        (NEGATIVE, "kv"),
        (NAME_MOVERS, "kv"),
        (BACKUPS, "kv"),
    ):
        edges.add(["embed"], nodes, inputs)
    edges.add(PREVIOUS, INDUCTION, "kv")
    edges.add((*INDUCTION, *DUPLICATE), S_INHIBITION, "kv")
    edges.add(S_INHIBITION, (*NEGATIVE, *NAME_MOVERS, *BACKUPS), "q")
    edges.add((*NEGATIVE, *NAME_MOVERS, *BACKUPS), ["logits"])
    return edges.mask


def greaterthan(graph: Graph) -> np.ndarray:
    """Greater-than of years in GPT-2 small: bool [n_receivers, n_senders + 1]. Hanna et al. 2023."""
    edges = _Edges(graph)
    early, other = ("a0.3", "a0.5"), ("a0.1",)
    middle = ("a5.5", "a6.1", "a6.9", "a7.10", "a8.11", "a9.1")
    first, last, below = _mlps(range(4)), _mlps(range(8, 12)), _mlps(range(9))
    edges.add(["embed"], [*early, *other, *first])
    edges.add([*middle, *last], ["logits"])
    edges.add(last, last)
    edges.add(below, below)  # the first group among them
    edges.add(other, first)
    edges.add([*other, *early, *first], middle)
    edges.add(middle, last)
    edges.add(below, middle, "q")
    edges.add([DIRECT], [*early, *other, *middle])
    return edges.mask


def docstring(graph: Graph) -> np.ndarray:
    """Argument names of a docstring in attn-only-4l: bool [n_receivers, n_senders + 1]. Heimersheim & Janiak 2023."""
    first = ("embed", "a0.5")
    reads: dict[str, tuple[str, ...]] = {
        "a0.5.v": ("embed",),
        "a1.4.v": first,
        "a2.0.q": first,
        "a2.0.k": first,
        "a2.0.v": ("a1.4",),
        "a1.2.q": first,
        "a1.2.k": first,
    }
    for mover in ("a3.0", "a3.6"):
        reads |= {f"{mover}.q": ("a1.4",), f"{mover}.k": ("a2.0", "a1.2"), f"{mover}.v": first}
    names = [f"{sender}->{receiver}" for receiver, senders in reads.items() for sender in (DIRECT, *senders)]
    return mask_of(graph, [*names, "a3.0->logits", "a3.6->logits"])


def names() -> dict[str, str]:
    return {name: about for name, (about, *_) in _TRUTHS.items()}


def load(name: str) -> Truth:
    """The truth ``name`` of ``names``. Its model comes from the hub; its edges need no weights."""
    about, config, build, task, n, source = _TRUTHS[name]
    graph = Graph(config)
    return Truth(
        name=name,
        about=about,
        graph=graph,
        mask=build(graph),
        n=n,
        get_model=partial(_model, config.name),
        get_task=partial(_task, task),
        facts={"kind": "found by hand", "source": source},
    )


_TRUTHS: dict[str, tuple[str, ModelConfig, Callable[[Graph], np.ndarray], str, int, str]] = {
    "ioi-gpt2": (
        "indirect object identification in GPT-2 small",
        GPT2_SMALL,
        ioi,
        "ioi",
        100,
        "Wang et al. 2022 (arXiv 2211.00593)",
    ),
    "greaterthan-gpt2": (
        "greater-than of years in GPT-2 small",
        GPT2_SMALL,
        greaterthan,
        "greaterthan",
        100,
        "Hanna et al. 2023 (arXiv 2305.00586)",
    ),
    "docstring-attn-only-4l": (
        "argument names of a docstring in attn-only-4l",
        ATTN_ONLY_4L,
        docstring,
        "docstring",
        50,
        "Heimersheim & Janiak 2023",
    ),
}


def _mlps(layers: Iterable[int]) -> list[str]:
    return [f"m{layer}" for layer in layers]


def _model(name: str) -> Transformer:
    """Raises PahqError where the weights cannot be had."""
    from pahq.model import load_model

    return load_model(name)


def _task(name: str) -> Task:
    from pahq.task import get_task

    return get_task(name)
