"""The computational graph of Conmy et al. 2023: who may read whom, counted and named.

A mask or score is one tensor ``[n_receivers, n_senders + 1]``. Columns are senders in order of
computation; the last column, ``direct``, is the edge from an attention receiver's own input to its
computed query, key or value.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from pahq.errors import PahqError
from pahq.graph.nodes import Receiver, ReceiverKind, Sender
from pahq.model.config import ModelConfig

DIRECT = "direct"


class Graph:
    """All edges of a model.

    split_qkv: a head has three receivers (q, k, v); otherwise one, ``qkv``. Under grouped-query
        attention k and v receivers exist once a group, and so does a joint ``qkv`` receiver.
    direct_edges: count (and let methods test) the edges from an input to its computed q, k or v.
    split_pos: the learned position embedding is its own sender, ``pos_embed``.
    """

    def __init__(
        self, config: ModelConfig, split_qkv: bool = True, direct_edges: bool = True, split_pos: bool = False
    ) -> None:
        if split_pos and config.positions != "learned":
            raise PahqError(
                f"graph: split_pos asks for a learned position embedding, but {config.name} has "
                f"'{config.positions}' positions; turn split_pos off"
            )
        self.config, self.split_qkv, self.direct_edges, self.split_pos = config, split_qkv, direct_edges, split_pos
        self.senders: list[Sender] = [Sender("embed", -1)]
        if split_pos:
            self.senders.append(Sender("pos_embed", -1))
        self.receivers: list[Receiver] = []
        for layer in range(config.n_layers):
            kinds: tuple[ReceiverKind, ...] = ("q", "k", "v") if split_qkv else ("qkv",)
            for kind in kinds:
                count = config.n_heads if kind == "q" else config.n_kv_heads
                self.receivers += [Receiver(kind, layer, index) for index in range(count)]
            self.senders += [Sender("head", layer, head) for head in range(config.n_heads)]
            if config.d_mlp:
                self.receivers.append(Receiver("mlp", layer))
                self.senders.append(Sender("mlp", layer))
        self.receivers.append(Receiver("logits", config.n_layers))
        self.sender_index = {sender: i for i, sender in enumerate(self.senders)}
        self.receiver_index = {receiver: i for i, receiver in enumerate(self.receivers)}

    @property
    def direct(self) -> int:
        """Column of the direct edges."""
        return len(self.senders)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.receivers), len(self.senders) + 1

    def n_upstream(self, receiver: Receiver) -> int:
        """How many senders (a prefix of ``senders``) come before ``receiver`` in the forward pass."""
        cfg = self.config
        embeddings = 1 + self.split_pos
        per_layer = cfg.n_heads + bool(cfg.d_mlp)
        before = embeddings + per_layer * receiver.layer
        return before + cfg.n_heads if receiver.kind == "mlp" and not cfg.parallel else before

    @cached_property
    def edges(self) -> np.ndarray:
        """bool [n_receivers, n_senders + 1]: the edges that exist."""
        allowed = np.zeros(self.shape, dtype=bool)
        for row, receiver in enumerate(self.receivers):
            allowed[row, : self.n_upstream(receiver)] = True
            allowed[row, self.direct] = self.direct_edges and receiver.is_attention
        allowed.setflags(write=False)
        return allowed

    @property
    def n_addition(self) -> int:
        return int(self.edges[:, : self.direct].sum())

    @property
    def n_direct(self) -> int:
        return int(self.edges[:, self.direct].sum())

    @property
    def n_edges(self) -> int:
        return self.n_addition + self.n_direct

    def check(self, what: str, mask: np.ndarray) -> None:
        """Raises PahqError unless ``mask`` is a set of this graph's edges: bool [n_receivers, n_senders + 1]."""
        if mask.shape != self.shape or mask.dtype != np.bool_:
            raise PahqError(
                f"{what}: {mask.dtype} {list(mask.shape)} does not fit the graph of {self.config.name}, which asks for "
                f"bool {list(self.shape)}"
            )
        strays = np.argwhere(mask & ~self.edges)
        if len(strays):
            raise PahqError(f"{what}: keeps {self.edge_name(*map(int, strays[0]))}, which is no edge of the graph")

    def heads_of(self, receiver: Receiver) -> range:
        """The heads that an attention receiver feeds (several under grouped-query attention)."""
        return self.heads_reading(receiver.kind, receiver.index)

    def heads_reading(self, which: str, index: int) -> range:
        """The heads of a layer that use query ``index``, or that group's key, value or joint input."""
        size = 1 if which == "q" else self.config.group_size
        return range(index * size, (index + 1) * size)

    def sender_name(self, column: int) -> str:
        return DIRECT if column == self.direct else self.senders[column].name

    def edge_name(self, row: int, column: int) -> str:
        """``a5.5->a9.6.q`` for an addition edge, ``direct->a9.6.q`` for a direct one."""
        return f"{self.sender_name(column)}->{self.receivers[row].name}"

    def edge(self, name: str) -> tuple[int, int]:
        """The inverse of ``edge_name``; raises PahqError for an edge that the graph lacks."""
        sender, arrow, receiver = (part.strip() for part in name.partition("->"))
        rows, columns = self._places
        if (
            not arrow
            or receiver not in rows
            or sender not in columns
            or not self.edges[rows[receiver], columns[sender]]
        ):
            raise PahqError(f"edge '{name}' does not exist in {self.config.name}; write it like 'm0->a1.0.q'")
        return rows[receiver], columns[sender]

    @cached_property
    def _places(self) -> tuple[dict[str, int], dict[str, int]]:
        """Rows by receiver's name, columns by sender's."""
        rows = {receiver.name: row for row, receiver in enumerate(self.receivers)}
        return rows, {sender.name: column for column, sender in enumerate(self.senders)} | {DIRECT: self.direct}

    def options(self) -> dict[str, bool]:
        return {"split_qkv": self.split_qkv, "direct_edges": self.direct_edges, "split_pos": self.split_pos}
