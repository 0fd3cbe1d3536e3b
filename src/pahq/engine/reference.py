"""Ordinary passes with everything kept: the clean run, and the run that removed edges fall back to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.graph import Receiver, Sender
from pahq.model.transformer import Transformer
from pahq.task.prompts import Prompts

Ablation = Literal["resample", "zero", "mean"]
ABLATIONS: tuple[str, ...] = get_args(Ablation)

POSITION_SEED = 49
"""Seed of the permuted positions under a split position embedding (Conmy et al.'s code)."""


@dataclass(frozen=True)
class Run:
    """Values of one pass over B examples of T tokens; under mean ablation B is 1.

    embed [B, T, d]: token embedding, plus the position embedding unless that is its own sender.
    pos_embed [1, T, d] or None. z [L][B, H, T, dh], mlp [L][B, T, d] (empty if attention-only).
    attn_in, mlp_in, final: residual streams [B, T, d] before the norm. q [L][B, H, T, dh],
    k and v [L][B, G, T, dh], before the rotary turn.
    """

    embed: Tensor
    pos_embed: Tensor | None
    attn_in: list[Tensor]
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    z: list[Tensor]
    mlp_in: list[Tensor]
    mlp: list[Tensor]
    final: Tensor

    def sender(self, sender: Sender) -> Tensor:
        """What a sender gives: [B, T, d], but [B, T, dh] before W_O for a head."""
        if sender.kind == "head":
            return self.z[sender.layer][:, sender.index]
        if sender.kind == "mlp":
            return self.mlp[sender.layer]
        value = self.embed if sender.kind == "embed" else self.pos_embed
        assert value is not None
        return value

    def receiver(self, receiver: Receiver) -> Tensor:
        """The residual stream [B, T, d] that a receiver reads, before its norm."""
        if receiver.kind == "logits":
            return self.final
        return self.mlp_in[receiver.layer] if receiver.kind == "mlp" else self.attn_in[receiver.layer]

    def projected(self, which: str, layer: int, index: int) -> Tensor:
        """q of a head, k or v of a group: [B, T, dh] before the rotary turn."""
        return {"q": self.q, "k": self.k, "v": self.v}[which][layer][:, index]


@torch.no_grad()
def run(
    model: Transformer, tokens: Tensor, split_pos: bool = False, positions: Tensor | None = None, zero: bool = False
) -> Run:
    """One pass over tokens [B, T], all values kept.

    positions: integer [T], the rows of W_pos to use (for a permuted position embedding).
    zero: every sender (embeddings, heads, MLPs) gives zero; only attention output biases remain.
    """
    cfg = model.config
    embed, pos = model.embed(tokens, positions)
    if pos is not None:
        pos = pos[None]
        if not split_pos:
            embed, pos = model.add(embed, pos), None
    if zero:
        embed = torch.zeros_like(embed)
        pos = None if pos is None else torch.zeros_like(pos)
    where = torch.arange(tokens.shape[-1], device=model.device)
    out = Run(embed, pos, [], [], [], [], [], [], [], embed)
    x = embed if pos is None else model.add(embed, pos)
    for layer, block in enumerate(model.blocks):
        out.attn_in.append(x)
        q, k, v = (block.attn.project_all(model.attn_input(x, layer, which, where), which) for which in "qkv")
        z = model.attend(q, k, v)
        z = torch.zeros_like(z) if zero else z
        for store, value in zip((out.q, out.k, out.v, out.z), (q, k, v, z), strict=True):
            store.append(value)
        middle = model.add(x, block.attn.write_all(z))
        if block.mlp is not None and block.ln2 is not None:
            read = x if cfg.parallel else middle
            mlp = torch.zeros_like(x) if zero else block.mlp(block.ln2(read))
            out.mlp_in.append(read)
            out.mlp.append(mlp)
            middle = model.add(middle, mlp)
        x = middle
    return Run(**{**vars(out), "final": x})


def mean_run(one: Run) -> Run:
    """The mean over examples, position by position, of every value of a run (B becomes 1)."""

    def mean(value: Tensor) -> Tensor:
        return value.mean(dim=0, keepdim=True)

    lists = {name: [mean(v) for v in getattr(one, name)] for name in ("attn_in", "q", "k", "v", "z", "mlp_in", "mlp")}
    pos = None if one.pos_embed is None else mean(one.pos_embed)
    return Run(embed=mean(one.embed), pos_embed=pos, final=mean(one.final), **lists)


def reference_run(model: Transformer, prompts: Prompts, ablation: str, split_pos: bool = False) -> Run:
    """The run whose values take the place of removed edges.

    ``resample``: the corrupted prompts (under split_pos with the same permutation of positions for
    every example). ``zero``: all senders silent. ``mean``: means over the corrupted prompts, position
    by position; needs prompts without padding.
    """
    if ablation not in ABLATIONS:
        raise PahqError(f"ablation '{ablation}' is unknown; choose one of {', '.join(ABLATIONS)}")
    if ablation == "zero":
        return run(model, prompts.clean, split_pos, zero=True)
    if ablation == "mean":
        if prompts.pad is not None and bool(prompts.pad.any()):
            raise PahqError("ablation 'mean': padded prompts have no common positions; use prompts of equal length")
        return mean_run(run(model, prompts.corrupt, split_pos))
    length = prompts.corrupt.shape[1]
    permuted = None
    if split_pos:
        permuted = torch.randperm(length, generator=torch.Generator().manual_seed(POSITION_SEED)).to(model.device)
    return run(model, prompts.corrupt, split_pos, permuted)
