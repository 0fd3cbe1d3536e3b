"""Nodes and their readable names: ``embed``, ``a9.6``, ``m3`` send; ``a9.6.q``, ``m3``, ``logits`` receive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SenderKind = Literal["embed", "pos_embed", "head", "mlp"]
ReceiverKind = Literal["q", "k", "v", "qkv", "mlp", "logits"]


@dataclass(frozen=True)
class Sender:
    """A node that writes to the residual stream. ``layer`` is -1 for embeddings; ``index`` is the head."""

    kind: SenderKind
    layer: int
    index: int = 0

    @property
    def name(self) -> str:
        if self.kind == "head":
            return f"a{self.layer}.{self.index}"
        return f"m{self.layer}" if self.kind == "mlp" else self.kind

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Receiver:
    """A node that reads the residual stream. ``index`` is the head for q, the key/value group for k and v."""

    kind: ReceiverKind
    layer: int
    index: int = 0

    @property
    def name(self) -> str:
        if self.kind == "logits":
            return "logits"
        return f"m{self.layer}" if self.kind == "mlp" else f"a{self.layer}.{self.index}.{self.kind}"

    @property
    def is_attention(self) -> bool:
        return self.kind in ("q", "k", "v", "qkv")

    def __str__(self) -> str:
        return self.name
