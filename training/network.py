"""The transformer while it is trained: our weight names, gates on all edges that differ from example to example."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pahq.graph import Graph, Receiver
from pahq.graph.nodes import ReceiverKind
from pahq.model.components import activate
from pahq.model.config import ModelConfig
from pahq.model.transformer import shapes

KINDS: tuple[ReceiverKind, ...] = ("q", "k", "v")


@dataclass(frozen=True)
class Pass:
    """One pass over B prompts of T tokens.

    logits [B, V] at the last position. written: what senders write, in the graph's order: the embedding [B, 1, T, d],
    then each layer's heads [B, H, T, d] and MLP [B, 1, T, d]. read: the residual streams
    [B, T, d] before each layer's attention, each MLP and the unembedding, in this order layer by layer. computed: q, k
    and v [B, H, T, dh] of each layer.
    """

    logits: Tensor
    written: list[Tensor]
    read: list[Tensor]
    computed: list[dict[str, Tensor]]

    def of(self, rows: Tensor) -> Pass:
        """The pass of other examples in the same batch: rows int64 [B]."""
        computed = [{which: value[rows] for which, value in layer.items()} for layer in self.computed]
        read, written = ([value[rows] for value in values] for values in (self.read, self.written))
        return Pass(self.logits[rows], written, read, computed)

    def mean(self) -> Pass:
        """The mean over examples, position by position: a batch of one."""
        computed = [{which: value.mean(0, keepdim=True) for which, value in layer.items()} for layer in self.computed]
        read, written = ([value.mean(0, keepdim=True) for value in values] for values in (self.read, self.written))
        return Pass(self.logits.mean(0, keepdim=True), written, read, computed)


class Network:
    """Weights that are trained, and passes through them. Learned positions, LayerNorm, MLPs without a gate."""

    def __init__(
        self,
        config: ModelConfig,
        generator: torch.Generator,
        alike: Iterable[tuple[int, int]] = (),
        offset: float = 0.0,
    ) -> None:
        """alike: (layer, head) whose keys begin as its queries do, so that it starts by looking for like tokens.

        offset: added to all position embeddings. As the mean over the stream it changes no LayerNorm's output, in
        exact arithmetic; rounded sums of the stream lose what is small beside it.
        """
        self.config, self.graph = config, Graph(config)
        self.weights = {
            name: _start(name, shape, config, generator).requires_grad_() for name, (shape, _) in shapes(config).items()
        }
        for layer, head in alike:
            at = f"blocks.{layer}.attn.W_"
            self.weights[f"{at}K"].data[head] = self.weights[f"{at}Q"].data[head]
        self.weights["pos_embed.W_pos"].data += offset
        self.allowed = torch.ones(config.n_ctx, config.n_ctx, dtype=torch.bool).tril()

    def run(self, tokens: Tensor, gates: Tensor | None = None, other: Pass | None = None) -> Pass:
        """The pass over tokens [B, T].

        gates: [B, receivers, senders + 1], 1 for an edge that carries this pass's value and 0 for one that carries
        the value of ``other``, as a removed edge does in ``engine.full``; all 1 if not given.
        """
        cfg, w = self.config, self.weights
        embed = w["embed.W_E"][tokens] + w["pos_embed.W_pos"][: tokens.shape[1]]
        stream, written = embed, [embed[:, None]]
        read: list[Tensor] = []
        computed: list[dict[str, Tensor]] = []
        changes: list[Tensor] = []

        def inputs(kind: ReceiverKind, layer: int, count: int) -> Tensor:
            """What the receivers of one kind read: [B, count, T, d] (1 for all where no gate tells them apart)."""
            if gates is None or other is None:
                return stream[:, None]
            for part, then in zip(written[len(changes) :], other.written[len(changes) :], strict=False):
                changes.append((part - then).flatten(2))
            change = torch.cat(changes, dim=1)
            first = self.graph.receiver_index[Receiver(kind, layer)]
            present = gates[:, first : first + count, : change.shape[1]]
            return other.read[len(read)][:, None] + (present @ change).unflatten(2, stream.shape[1:])

        for layer in range(cfg.n_layers):
            at = f"blocks.{layer}"
            values: dict[str, Tensor] = {}
            x = self._norm(inputs("q", layer, 3 * cfg.n_heads), f"{at}.ln1")  # rows of q, then k, then v
            for kind, part in zip(KINDS, x.chunk(3, dim=1) if x.shape[1] > 1 else (x, x, x), strict=True):
                value = _heads(part, w[f"{at}.attn.W_{kind.upper()}"]) + w[f"{at}.attn.b_{kind.upper()}"][:, None]
                if gates is not None and other is not None:
                    first = self.graph.receiver_index[Receiver(kind, layer)]
                    direct = gates[:, first : first + cfg.n_heads, self.graph.direct, None, None]
                    value = torch.lerp(other.computed[layer][kind].expand_as(value), value, direct)
                values[kind] = value
            computed.append(values)
            read.append(stream)
            scores = values["q"] @ values["k"].transpose(-1, -2) * cfg.scale
            scores = scores.masked_fill(~self.allowed[: tokens.shape[1], : tokens.shape[1]], float("-inf"))
            heads = _heads(torch.softmax(scores, dim=-1) @ values["v"], w[f"{at}.attn.W_O"])
            written.append(heads)
            stream = stream + heads.sum(1) + w[f"{at}.attn.b_O"]
            x = self._norm(inputs("mlp", layer, 1)[:, 0], f"{at}.ln2")
            hidden = activate(x @ w[f"{at}.mlp.W_in"] + w[f"{at}.mlp.b_in"], cfg.act)
            out = hidden @ w[f"{at}.mlp.W_out"] + w[f"{at}.mlp.b_out"]
            written.append(out[:, None])
            read.append(stream)
            stream = stream + out
        final = inputs("logits", cfg.n_layers, 1)[:, 0, -1]
        read.append(stream)
        logits = self._norm(final, "ln_final") @ w["unembed.W_U"] + w["unembed.b_U"]
        return Pass(logits, written, read, computed)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.w"], self.weights[f"{name}.b"], self.config.norm_eps)


def _heads(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, H, T, i] or [B, 1, T, i], weight [H, i, o] -> [B, H, T, o]: one product a head, not one an example."""
    if x.shape[1] == 1:
        return torch.einsum("bti,hio->bhto", x[:, 0], weight)
    return torch.einsum("bhti,hio->bhto", x, weight)


def _start(name: str, shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Initial weights: unit scale through every part, what is written to the residual stream smaller by depth."""
    last = name.rsplit(".", 1)[-1]
    if last == "w":
        return torch.ones(shape)
    if last.startswith("b"):
        return torch.zeros(shape)
    value = torch.randn(shape, generator=generator)
    if last in ("W_E", "W_pos"):
        return 0.5 * value
    if last in ("W_O", "W_out"):
        inner = shape[-2] * (config.n_heads if last == "W_O" else 1)
        return value / (config.n_layers * inner) ** 0.5
    return value / shape[-2] ** 0.5
