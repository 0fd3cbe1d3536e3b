"""A decoder-only transformer over plain weight tensors, and its ordinary forward pass.

Weights are named as in TransformerLens (``blocks.0.attn.W_Q`` …); ``shapes`` lists them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.model.components import MLP, Attention, Norm, Rotary, allowed_keys
from pahq.model.config import ModelConfig
from pahq.model.products import wide


@dataclass(frozen=True)
class Block:
    """One layer. ``mlp`` and ``ln2`` are None in attention-only models."""

    ln1: Norm
    attn: Attention
    ln2: Norm | None
    mlp: MLP | None


@dataclass(frozen=True)
class Transformer:
    """A model ready to run.

    W_E [d_vocab, d], W_pos [n_ctx, d] or None, W_U [d, d_vocab_out], b_U [d_vocab_out] or None.
    tokenizer: a ``transformers`` tokenizer or None; source: where the weights came from, for the record.
    """

    config: ModelConfig
    W_E: Tensor
    W_pos: Tensor | None
    blocks: Sequence[Block]
    ln_final: Norm
    W_U: Tensor
    b_U: Tensor | None
    rotary: Rotary | None
    weights: Mapping[str, Tensor]
    tokenizer: Any = None
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_E.dtype

    @property
    def frames(self) -> Sequence[Block]:
        """The blocks for what is small in them: norms, biases, shapes' existence. Their matrices may be absent."""
        return self.blocks

    @property
    def masters(self) -> Sequence[Block]:
        """The blocks with all weights where they are kept, wherever that is."""
        return self.blocks

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Transformer:
        """The same model on another device or in another floating-point type."""
        moved = {name: weight.to(device=device, dtype=dtype) for name, weight in self.weights.items()}
        if "rotary.inv_freq" in moved:  # angles of late positions need more digits than a low-precision type has
            moved["rotary.inv_freq"] = self.weights["rotary.inv_freq"].to(device=device)
        return build(self.config, moved, self.tokenizer, self.source, check_values=False)

    def embed(self, tokens: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """tokens [B, T] -> token embedding [B, T, d] and position embedding [T, d] (None if not learned).

        positions: integer [T], for runs with permuted positions.
        """
        if tokens.shape[-1] > self.config.n_ctx:
            raise PahqError(
                f"prompt: {tokens.shape[-1]} tokens are more than the {self.config.n_ctx} that "
                f"{self.config.name} takes; shorten the prompts"
            )
        where = torch.arange(tokens.shape[-1], device=self.device) if positions is None else positions
        pos = self.W_pos[where] if self.config.positions == "learned" and self.W_pos is not None else None
        return self.embed_tokens(tokens), pos

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """tokens [...] -> their rows of W_E [..., d]"""
        return self.W_E[tokens]

    def attn_input(self, x: Tensor, layer: int, which: str, positions: Tensor) -> Tensor:
        """Residual x [..., P, d] at integer ``positions`` [..., P] -> normalised input of q, k or v."""
        x = self.frames[layer].ln1(x)
        if self.config.positions == "shortformer" and which != "v":
            assert self.W_pos is not None
            x = x + self.W_pos[positions]
        return x

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys [..., P, dh] -> turned by their positions, where the model has rotary positions."""
        return x if self.rotary is None else self.rotary(x, positions)

    def unembed(self, x: Tensor) -> Tensor:
        """Residual x [..., d] -> logits [..., d_vocab_out], final norm included."""
        out = self.times_unembedding(self.unembed_input(x))
        return self.logits(out if self.b_U is None else out + self.b_U)

    def unembedding(self) -> Iterator[tuple[slice, Tensor]]:
        """W_U in pieces: (its columns, the piece [d, some] on the device), each valid until the next is asked for."""
        yield slice(0, self.W_U.shape[1]), self.W_U

    def times_unembedding(self, h: Tensor) -> Tensor:
        """h [..., d] @ W_U -> [..., V]"""
        parts = [wide(h, piece) for _, piece in self.unembedding()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def columns(self, tokens: Tensor) -> Tensor:
        """Unembedding vectors of tokens [...] -> [..., d], on the device."""
        return self.W_U.T[tokens.to(self.W_U.device)].to(self.device)

    def unembed_input(self, x: Tensor) -> Tensor:
        """Residual x [..., d] -> what is multiplied by W_U [..., d]."""
        return self.ln_final(x)

    def logits(self, x: Tensor) -> Tensor:
        """Logits as they come out of that product, bias included -> as they are used, the same shape."""
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shared: bool = True) -> Tensor:
        """q [B, H, T, dh], k and v [B, G, T, dh] before the rotary turn -> z [B, H, T, dh].

        shared: k and v are those of groups of heads, where the model has groups; else one for each q given.
        """
        return self.attention(q, k, shared) @ (self.by_head(v) if shared else v)

    def attention(self, q: Tensor, k: Tensor, shared: bool = True) -> Tensor:
        """q [B, H, T, dh] and k [B, G, T, dh] before the rotary turn -> attention patterns [B, H, T, T]."""
        cfg, where = self.config, torch.arange(q.shape[-2], device=q.device)
        q, k = self.rotate(q, where), self.rotate(k, where)
        scores = q @ (self.by_head(k) if shared else k).transpose(-1, -2) * cfg.scale
        allowed = allowed_keys(where, where, cfg.causal, cfg.window)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        return self.pattern(scores)

    def by_head(self, grouped: Tensor) -> Tensor:
        """Keys or values of groups [B, G, ...] -> of all heads [B, H, ...]."""
        size = self.config.group_size
        return grouped.repeat_interleave(size, dim=1) if size > 1 else grouped

    def pattern(self, scores: Tensor) -> Tensor:
        """Attention scores [..., T, T'] -> attention pattern, the same shape."""
        return torch.softmax(scores, dim=-1)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """A sum in the residual stream [..., d]."""
        return self.keep(x + y)

    def keep(self, x: Tensor) -> Tensor:
        """A sum in the residual stream [..., d] as this model keeps it."""
        return x

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> logits [B, T, d_vocab_out]. The plain pass, nothing patched."""
        return self.unembed(self.residual(tokens))

    @torch.no_grad()
    def residual(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> final residual stream [B, T, d]."""
        x, pos = self.embed(tokens)
        x = x if pos is None else self.add(x, pos)
        where = torch.arange(tokens.shape[-1], device=self.device)
        for layer, block in enumerate(self.blocks):
            q, k, v = (block.attn.project_all(self.attn_input(x, layer, which, where), which) for which in "qkv")
            middle = self.add(x, block.attn.write_all(self.attend(q, k, v)))
            if block.mlp is not None and block.ln2 is not None:
                middle = self.add(middle, block.mlp(block.ln2(x if self.config.parallel else middle)))
            x = middle
        return x


def shapes(cfg: ModelConfig) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Every weight name -> (shape, required). Names absent from this table are refused."""
    d, dh, heads, groups, mlp = cfg.d_model, cfg.d_head, cfg.n_heads, cfg.n_kv_heads, cfg.d_mlp
    table: dict[str, tuple[tuple[int, ...], bool]] = {"embed.W_E": ((cfg.d_vocab, d), True)}
    if cfg.positions in ("learned", "shortformer"):
        table["pos_embed.W_pos"] = ((cfg.n_ctx, d), True)
    if cfg.positions == "rotary":
        table["rotary.inv_freq"] = ((cfg.rotary_dim // 2,), True)
    norms = {"none": "", "rms": "w", "layer": "wb"}[cfg.norm]  # RMSNorm has no bias
    for layer in range(cfg.n_layers):
        at = f"blocks.{layer}.attn"
        table |= {f"{at}.W_Q": ((heads, d, dh), True), f"{at}.W_O": ((heads, dh, d), True)}
        table |= {f"{at}.W_{x}": ((groups, d, dh), True) for x in "KV"}
        table |= {f"{at}.b_Q": ((heads, dh), False), f"{at}.b_O": ((d,), False)}
        table |= {f"{at}.b_{x}": ((groups, dh), False) for x in "KV"}
        if cfg.qk_norm:
            table |= {f"{at}.{x}_norm.w": ((dh,), True) for x in "qk"}
        table |= {f"blocks.{layer}.ln1.{part}": ((d,), False) for part in norms}
        if not mlp:
            continue
        table |= {f"blocks.{layer}.ln2.{part}": ((d,), False) for part in norms}
        at = f"blocks.{layer}.mlp"
        table |= {f"{at}.W_in": ((d, mlp), True), f"{at}.W_out": ((mlp, d), True)}
        table |= {f"{at}.b_in": ((mlp,), False), f"{at}.b_out": ((d,), False)}
        if cfg.gated:
            table |= {f"{at}.W_gate": ((d, mlp), True), f"{at}.b_gate": ((mlp,), False)}
        if cfg.act == "solu_ln":
            table |= {f"{at}.ln.{part}": ((mlp,), False) for part in "wb"}
    table |= {f"ln_final.{part}": ((d,), False) for part in norms}
    return table | {"unembed.W_U": ((d, cfg.d_vocab_out), True), "unembed.b_U": ((cfg.d_vocab_out,), False)}


def check_weights(cfg: ModelConfig, weights: Mapping[str, Tensor], check_values: bool = True) -> None:
    """Raises PahqError for a missing, unknown, wrongly shaped or non-finite weight, naming it."""
    table = shapes(cfg)
    for name in weights:
        if name not in table:
            raise PahqError(f"weights: '{name}' is not a weight of {cfg.name} ({cfg.architecture}); remove it")
    for name, (shape, required) in table.items():
        if name not in weights:
            if required:
                raise PahqError(f"weights: '{name}' {list(shape)} is missing in {cfg.name}; the file is incomplete")
            continue
        if tuple(weights[name].shape) != shape:
            raise PahqError(
                f"weights: '{name}' of {cfg.name} has shape {list(weights[name].shape)}, "
                f"but its configuration asks for {list(shape)}"
            )
        if check_values and not torch.isfinite(weights[name].sum()) and not torch.isfinite(weights[name]).all():
            raise PahqError(f"weights: '{name}' of {cfg.name} holds NaN or infinity; the file is damaged")


def build(
    cfg: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Any = None,
    source: Mapping[str, Any] | None = None,
    check_values: bool = True,
) -> Transformer:
    """A Transformer from named weights (see ``shapes``); raises PahqError where they do not fit ``cfg``."""
    check_weights(cfg, weights, check_values)
    weights = {name: weight.detach() for name, weight in weights.items()}  # else every pass would record a graph
    get = weights.get

    def norm(name: str, kind: Any = cfg.norm) -> Norm:
        w, b = get(f"{name}.w"), get(f"{name}.b")
        if kind == "layer" and (w is None or b is None):
            # torch's layer norm takes twice as long without weights as with ones and zeros
            template = weights["embed.W_E"].new_empty(cfg.d_mlp if name.endswith("mlp.ln") else cfg.d_model)
            w = torch.ones_like(template) if w is None else w
            b = torch.zeros_like(template) if b is None else b
        return Norm(kind, cfg.norm_eps, w, b)

    blocks = []
    for layer in range(cfg.n_layers):
        at = f"blocks.{layer}.attn"
        attn = Attention(
            *(weights[f"{at}.W_{x}"] for x in "QKVO"),
            *(get(f"{at}.b_{x}") for x in "QKVO"),
            q_norm=norm(f"{at}.q_norm", "rms") if cfg.qk_norm else None,
            k_norm=norm(f"{at}.k_norm", "rms") if cfg.qk_norm else None,
        )
        mlp = None
        if cfg.d_mlp:
            at = f"blocks.{layer}.mlp"
            mlp = MLP(
                cfg.act,
                weights[f"{at}.W_in"],
                weights[f"{at}.W_out"],
                get(f"{at}.W_gate"),
                get(f"{at}.b_in"),
                get(f"{at}.b_gate"),
                get(f"{at}.b_out"),
                norm(f"{at}.ln", "layer") if cfg.act == "solu_ln" else None,
            )
        ln2 = norm(f"blocks.{layer}.ln2") if cfg.d_mlp else None
        blocks.append(Block(norm(f"blocks.{layer}.ln1"), attn, ln2, mlp))
    rotary = None
    if cfg.positions == "rotary":
        inv_freq = weights["rotary.inv_freq"].float()
        angles = torch.arange(cfg.n_ctx, device=inv_freq.device).float()[:, None] * inv_freq
        rotary = Rotary(angles.cos() * cfg.rotary_scale, angles.sin() * cfg.rotary_scale, cfg.rotary_interleaved)
    return Transformer(
        config=cfg,
        W_E=weights["embed.W_E"],
        W_pos=get("pos_embed.W_pos"),
        blocks=tuple(blocks),
        ln_final=norm("ln_final"),
        W_U=weights["unembed.W_U"],
        b_U=get("unembed.b_U"),
        rotary=rotary,
        weights=weights,
        tokenizer=tokenizer,
        source=dict(source or {}),
    )
