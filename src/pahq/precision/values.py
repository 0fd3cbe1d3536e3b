"""A model that rounds values: inputs and weights of every product, and what else a policy names.

This is the arithmetic of Wang et al. 2025 (``pahq-values``) and of their failing baseline (``rtn``). Rounding
depends on a row alone, so a component whose input did not change gives the same output bit for bit. Gradients,
where there are any, pass straight through what is rounded here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pahq.model.components import MLP, Attention, Norm
from pahq.model.transformer import Block, Transformer
from pahq.precision.formats import Format
from pahq.precision.matrix import LowMatrix, low_matrix
from pahq.precision.policy import Policy
from pahq.precision.store import WeightStore
from pahq.precision.straight import round_through

SLAB = 1 << 12
"""Tokens whose unembedding is expanded to FP32 at a time: few, so that their memory is used again, not asked for."""


@dataclass(frozen=True, kw_only=True)
class RoundedNorm(Norm):
    """A norm whose output is rounded."""

    fmt: Format

    def __call__(self, x: Tensor) -> Tensor:
        return round_through(super().__call__(x), self.fmt)


@dataclass(frozen=True, kw_only=True)
class RoundedAttention(Attention):
    """matrices: q, k, v, o -> one low-precision matrix a head (group)."""

    matrices: dict[str, list[LowMatrix]]

    def project(self, x: Tensor, which: str, index: int) -> Tensor:
        _, bias, norm = self.parts(which)
        out = self.matrices[which][index].multiply(x)
        out = out if bias is None else out + bias[index]
        return out if norm is None else norm(out)

    def project_all(self, x: Tensor, which: str) -> Tensor:
        return torch.stack([self.project(x, which, index) for index in range(len(self.matrices[which]))], dim=-3)

    def project_each(self, x: Tensor, which: str) -> Tensor:
        return torch.stack([self.project(one, which, index) for index, one in enumerate(x)], dim=1)

    def write_each(self, z: Tensor) -> Tensor:
        return torch.stack([self.write(z[:, head], head) for head in range(z.shape[1])])

    def write(self, z: Tensor, head: int) -> Tensor:
        return self.matrices["o"][head].multiply(z)

    def write_all(self, z: Tensor) -> Tensor:
        out = sum((self.write(z[:, head], head) for head in range(1, z.shape[1])), self.write(z[:, 0], 0))
        return out if self.b_O is None else out + self.b_O


@dataclass(frozen=True, kw_only=True)
class RoundedMLP(MLP):
    """An MLP of low-precision matrices."""

    low_in: LowMatrix
    low_out: LowMatrix
    low_gate: LowMatrix | None

    def hidden(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        encoded = self.low_in.encode(rows)
        gate = None if self.low_gate is None else _biased(self.low_gate.product(encoded), self.b_gate)
        return _biased(self.low_in.product(encoded), self.b_in), gate

    def write(self, hidden: Tensor) -> Tensor:
        return _biased(self.low_out.multiply(hidden), self.b_out)


@dataclass(frozen=True, kw_only=True)
class RoundedTransformer(Transformer):
    """A transformer of rounded values, which computes on ``home``.

    embedding_rows, unembedding_rows: what their formats keep of W_E and W_U, by token. W_E and W_U themselves are the
    masters, which may be in host memory; W_pos is rounded.
    """

    policy: Policy
    home: torch.device
    embedding_rows: LowMatrix
    unembedding_rows: LowMatrix

    @property
    def device(self) -> torch.device:
        return self.home

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return self._rows(self.embedding_rows, tokens)

    def unembedding(self) -> Iterator[tuple[slice, Tensor]]:
        kept, count = self.unembedding_rows, self.W_U.shape[1]
        as_it_is = kept.values.dtype == self.dtype and kept.values.device == self.home
        width = count if as_it_is else SLAB
        for first in range(0, count, width):
            part = slice(first, min(first + width, count))
            yield part, kept.rows(part).to(self.home).T

    def columns(self, tokens: Tensor) -> Tensor:
        return self._rows(self.unembedding_rows, tokens)

    def _rows(self, kept: LowMatrix, tokens: Tensor) -> Tensor:
        return kept.rows(tokens.to(kept.values.device)).to(self.home)

    def pattern(self, scores: Tensor) -> Tensor:
        return round_through(super().pattern(scores), self.policy.format("softmax"))

    def keep(self, x: Tensor) -> Tensor:
        return round_through(x, self.policy.format("residual"))

    def unembed_input(self, x: Tensor) -> Tensor:
        return round_through(super().unembed_input(x), self.policy.format("unembed"))

    def logits(self, x: Tensor) -> Tensor:
        return round_through(x, self.policy.format("metric"))


def rounded_model(model: Transformer, policy: Policy, store: WeightStore) -> RoundedTransformer:
    """The model as a policy that quantises values (or FP32) computes it; ``store`` keeps its weights."""
    assert not policy.differences
    cfg, norm = model.config, policy.format("norm")

    def rounded(one: Norm) -> Norm:
        return one if norm.is_exact else RoundedNorm(**fields_of(one), fmt=norm)

    blocks = []
    for layer, block in enumerate(model.frames):
        counts = {"q": cfg.n_heads, "k": cfg.n_kv_heads, "v": cfg.n_kv_heads, "o": cfg.n_heads}
        matrices = {name: [store.matrix(name, layer, i) for i in range(count)] for name, count in counts.items()}
        attn, mlp, ln2 = RoundedAttention(**fields_of(block.attn), matrices=matrices), None, None
        if block.mlp is not None and block.ln2 is not None:
            ln2 = rounded(block.ln2)
            gate = None if block.mlp.W_gate is None else store.matrix("mlp_gate", layer)
            mlp = RoundedMLP(
                **fields_of(block.mlp),
                low_in=store.matrix("mlp_in", layer),
                low_out=store.matrix("mlp_out", layer),
                low_gate=gate,
            )
        blocks.append(Block(rounded(block.ln1), attn, ln2, mlp))
    own = {f.name: getattr(model, f.name) for f in fields(Transformer)}  # a streamed model has more
    own |= {"blocks": tuple(blocks), "ln_final": rounded(model.ln_final)}
    if policy.values:
        own["W_pos"], embed, unembed = store.positions(), store.embedding(), store.matrix("unembed")
    else:
        embed, unembed = low_matrix(model.W_E.T, "fp32"), low_matrix(model.W_U, "fp32")
    return RoundedTransformer(**own, policy=policy, home=model.device, embedding_rows=embed, unembedding_rows=unembed)


def fields_of(value: Any) -> dict[str, Any]:
    """A dataclass's fields by name, to make one of a class derived from its own."""
    return {f.name: getattr(value, f.name) for f in fields(value)}


def _biased(value: Tensor, bias: Tensor | None) -> Tensor:
    return value if bias is None else value + bias
