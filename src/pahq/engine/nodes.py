"""The value of single nodes for many states at once. Shapes: S states, B examples, P positions of a reach."""

from __future__ import annotations

import torch
from torch import Tensor

from pahq.engine.flops import Flops
from pahq.engine.marks import Reach
from pahq.engine.spans import Spans
from pahq.model.components import allowed_keys
from pahq.model.transformer import Transformer

MLP_TOKENS = 2048
"""Tokens an MLP takes at a time: its hidden layer then stays in the cache."""


class Nodes:
    """Computes queries, keys, values, heads and MLPs from patched inputs; counts what that costs."""

    def __init__(self, model: Transformer, spans: Spans, flops: Flops) -> None:
        self.model, self.spans, self.flops = model, spans, flops
        self._allowed: dict[Reach, Tensor | None] = {}

    def project(self, x: Tensor, which: str, layer: int, index: int, level: Reach) -> Tensor:
        """Residual x [S, B, P, d] -> q, k or v of a head or group [S, B, P, dh], turned by its positions."""
        attn = self.model.blocks[layer].attn
        positions = self.spans.positions(level)
        self.flops.add("qkv", x.numel() * self.model.config.d_head)
        out = attn.project(self.model.attn_input(x, layer, which, positions), which, index)
        return self.rotate(out, which, level)

    def rotate(self, value: Tensor, which: str, level: Reach) -> Tensor:
        """q, k or v [..., B, P, dh] of a reach, as computed from its input -> as attention uses it."""
        return value if which == "v" else self.model.rotate(value, self.spans.positions(level))

    def allowed(self, level: Reach) -> Tensor | None:
        """Which of the keys 0 to stop a query may see: bool [B or 1, P, stop], or None if all."""
        if level not in self._allowed:
            cfg, query = self.model.config, self.spans.positions(level)
            keys = torch.arange(self.spans.stop, device=query.device)
            mask = allowed_keys(query if query.ndim == 2 else query[None], keys, cfg.causal, cfg.window)
            self._allowed[level] = mask
        return self._allowed[level]

    def head(self, q: Tensor, k: Tensor, v: Tensor, level: Reach, k_clean: Tensor, v_clean: Tensor) -> Tensor:
        """Attention of one head in S states -> z [S, B, P, dh].

        q [S or 1, B, P, dh]. k and v [S or 1, B, stop - start, dh] at the positions that can differ;
        those before ``start`` come from the clean run: k_clean, v_clean [B, start, dh].
        A leading 1 means that all states share the value; its products are then done once for all.
        """
        scores = _scores(q, k)
        if self.spans.start:
            scores = torch.cat((_scores(q, k_clean[None]).expand(*scores.shape[:-1], -1), scores), dim=-1)
        scores = scores.mul_(self.model.config.scale)
        allowed = self.allowed(level)
        if allowed is not None:
            scores = scores.masked_fill_(~allowed, float("-inf"))
        pattern = self.model.pattern(scores)
        self.flops.add("attention", 2 * pattern.numel() * v.shape[-1])
        z = _mix(pattern[..., self.spans.start :], v)
        if self.spans.start:
            z = z + _mix(pattern[..., : self.spans.start], v_clean[None])
        return z

    def mlp(self, x: Tensor, layer: int) -> Tensor:
        """Residual x [S, B, P, d] -> the MLP's output, same shape."""
        block = self.model.blocks[layer]
        assert block.mlp is not None
        assert block.ln2 is not None
        rows = x.reshape(-1, x.shape[-1])
        self.flops.add("mlp", (3 if block.mlp.W_gate is not None else 2) * rows.numel() * self.model.config.d_mlp)
        if rows.shape[0] <= MLP_TOKENS:
            return block.mlp(block.ln2(rows)).view(x.shape)
        out = torch.empty_like(rows)
        for first in range(0, rows.shape[0], MLP_TOKENS):
            part = slice(first, first + MLP_TOKENS)
            out[part] = block.mlp(block.ln2(rows[part]))
        return out.view(x.shape)

    def mlp_products(self, x: Tensor, layer: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Residual x [B, P, d] of one state -> the MLP's output, and its hidden layer and gate if any [B, P, d_mlp]."""
        mlp, ln2 = self.model.blocks[layer].mlp, self.model.blocks[layer].ln2
        assert mlp is not None
        assert ln2 is not None
        self.flops.add("mlp", (3 if mlp.W_gate is not None else 2) * x.numel() * self.model.config.d_mlp)
        hidden, gate = mlp.hidden(ln2(x).flatten(0, -2))
        out = mlp.write(mlp.act_on(hidden, gate)).view(x.shape)
        return out, tuple(part.view(*x.shape[:-1], -1) for part in (hidden, gate) if part is not None)

    def write(self, z: Tensor, layer: int, head: int, component: str = "out") -> Tensor:
        """z [..., dh] of one head -> what it adds to the residual stream [..., d]. component: where it is counted."""
        self.flops.add(component, z.numel() * self.model.config.d_model)
        return self.model.blocks[layer].attn.write(z, head)

    def write_into(self, x: Tensor, z: Tensor, layer: int, head: int) -> None:
        """x [..., d] += what z [..., dh] of one head writes, in place."""
        self.flops.add("out", z.numel() * self.model.config.d_model)
        x.view(-1, x.shape[-1]).addmm_(z.reshape(-1, z.shape[-1]), self.model.blocks[layer].attn.W_O[head])


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q [S or 1, B, P, dh], k [S or 1, B, T, dh] -> [S, B, P, T]; a shared side meets all states in one product."""
    if k.shape[0] == 1 and q.shape[0] > 1:
        states, batch, count, width = q.shape
        flat = q.transpose(0, 1).reshape(batch, states * count, width)
        return (flat @ k[0].transpose(-1, -2)).view(batch, states, count, -1).transpose(0, 1).contiguous()
    if q.shape[0] == 1 and k.shape[0] > 1:
        return _scores(k, q).transpose(-1, -2).contiguous()
    return q @ k.transpose(-1, -2)


def _mix(pattern: Tensor, v: Tensor) -> Tensor:
    """pattern [S or 1, B, P, T], v [S or 1, B, T, dh] -> [S, B, P, dh]"""
    if v.shape[0] == 1 and pattern.shape[0] > 1:
        states, batch, count, keys = pattern.shape
        flat = pattern.transpose(0, 1).reshape(batch, states * count, keys)
        return (flat @ v[0]).view(batch, states, count, -1).transpose(0, 1)
    if pattern.shape[0] == 1 and v.shape[0] > 1:
        states, batch, keys, width = v.shape
        flat = v.permute(1, 2, 0, 3).reshape(batch, keys, states * width)
        return (pattern[0] @ flat).view(batch, -1, states, width).permute(2, 0, 1, 3)
    return pattern @ v
