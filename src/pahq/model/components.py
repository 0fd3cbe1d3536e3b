"""The maths of a transformer block as plain functions: norm, activation, rotary turn, attention, MLP.

Every function works on any leading dimensions, so that the engine can add a dimension of
states in front of the batch. Shapes: d = d_model, dh = d_head, T = positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pahq.model.config import Activation, NormKind


@dataclass(frozen=True)
class Norm:
    """LayerNorm, RMSNorm or nothing; ``w`` and ``b`` [d] are None where they were folded away."""

    kind: NormKind
    eps: float
    w: Tensor | None = None
    b: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]"""
        if self.kind == "none":
            return x
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.w, self.b, self.eps)
        # Not F.rms_norm: on CPUs it takes several times as long as these two passes.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        x = x * torch.rsqrt(length.square() / x.shape[-1] + self.eps)
        return x if self.w is None else x.mul_(self.w)


def activate(x: Tensor, act: Activation) -> Tensor:
    """The nonlinearity ``act`` applied to x [..., d_mlp]; ``solu_ln``'s norm is the MLP's affair."""
    if act == "relu":
        return F.relu(x)
    if act == "gelu":
        return F.gelu(x)
    if act == "gelu_new":
        return F.gelu(x, approximate="tanh")
    if act == "gelu_quick":
        return x * torch.sigmoid(1.702 * x)
    if act == "silu":
        return F.silu(x)
    return x * torch.softmax(x, dim=-1)  # solu, solu_ln


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding. ``cos``/``sin`` [n_ctx, rotary_dim / 2], already scaled."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    @property
    def dim(self) -> int:
        return 2 * self.cos.shape[-1]

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [..., P, dh] at integer ``positions`` (broadcastable to [..., P]) -> the same shape."""
        cos, sin = self.cos[positions].to(x.dtype), self.sin[positions].to(x.dtype)
        turned, rest = x[..., : self.dim], x[..., self.dim :]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        else:
            a, b = turned.chunk(2, dim=-1)
            turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


@dataclass(frozen=True)
class Attention:
    """Weights of one attention layer, a head per leading index.

    W_Q [H, d, dh], W_K and W_V [G, d, dh], W_O [H, dh, d]; biases b_Q [H, dh], b_K and b_V [G, dh],
    b_O [d]; q_norm and k_norm act on a head's dh coordinates before the rotary turn.
    """

    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    b_Q: Tensor | None = None
    b_K: Tensor | None = None
    b_V: Tensor | None = None
    b_O: Tensor | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    def parts(self, which: str) -> tuple[Tensor, Tensor | None, Norm | None]:
        """Weight, bias and norm of all heads' (groups') ``which``: q, k or v."""
        if which == "q":
            return self.W_Q, self.b_Q, self.q_norm
        return (self.W_K, self.b_K, self.k_norm) if which == "k" else (self.W_V, self.b_V, None)

    def project(self, x: Tensor, which: str, index: int) -> Tensor:
        """Normalised input x [..., d] of head (group) ``index`` -> its q, k or v [..., dh].

        Query/key norms are part of it, the rotary turn is not.
        """
        weights, bias, norm = self.parts(which)
        weight = weights[index]
        out = x @ weight if bias is None else torch.addmm(bias[index], x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
        return out if norm is None else norm(out)

    def project_all(self, x: Tensor, which: str) -> Tensor:
        """Normalised input x [..., T, d] shared by all heads -> [..., heads, T, dh] (groups for k and v)."""
        weight, bias, norm = self.parts(which)
        out = torch.einsum("...td,hdc->...htc", x, weight)  # x @ weight would make a copy of x for each head
        out = out if bias is None else out + bias[:, None, :]
        return out if norm is None else norm(out)

    def project_each(self, x: Tensor, which: str) -> Tensor:
        """Normalised inputs of their own x [heads, B, T, d] (groups for k and v) -> [B, heads, T, dh]."""
        weight, bias, norm = self.parts(which)
        out = torch.einsum("hbtd,hdc->bhtc", x, weight)
        out = out if bias is None else out + bias[:, None]
        return out if norm is None else norm(out)

    def write_each(self, z: Tensor) -> Tensor:
        """All heads' z [B, H, T, dh] -> what each adds to the residual stream [H, B, T, d], without b_O."""
        return z.transpose(0, 1) @ self.W_O[:, None]

    def write(self, z: Tensor, head: int) -> Tensor:
        """One head's z [..., dh] -> what it adds to the residual stream [..., d], without b_O."""
        return z @ self.W_O[head]

    def write_all(self, z: Tensor) -> Tensor:
        """All heads' z [B, H, T, dh] -> what the layer adds to the residual stream [B, T, d], b_O included."""
        out = torch.einsum("bhtc,hcd->btd", z, self.W_O)
        return out if self.b_O is None else out + self.b_O


@dataclass(frozen=True)
class MLP:
    """W_in and W_gate [d, d_mlp], W_out [d_mlp, d]; W_gate only in gated MLPs; ``ln`` only for solu_ln."""

    act: Activation
    W_in: Tensor
    W_out: Tensor
    W_gate: Tensor | None = None
    b_in: Tensor | None = None
    b_gate: Tensor | None = None
    b_out: Tensor | None = None
    ln: Norm | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Normalised input x [..., d] -> what the MLP writes [..., d], b_out included."""
        rows = x.reshape(-1, x.shape[-1])
        return self.write(self.act_on(*self.hidden(rows))).view(x.shape)

    def hidden(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised input [n, d] -> the hidden layer [n, d_mlp] before the nonlinearity, and its gate if any."""
        gate = None if self.W_gate is None else linear(rows, self.W_gate, self.b_gate)
        return linear(rows, self.W_in, self.b_in), gate

    def act_on(self, hidden: Tensor, gate: Tensor | None) -> Tensor:
        """The hidden layer [..., d_mlp] after the nonlinearity."""
        out = activate(hidden if gate is None else gate, self.act)
        if gate is not None:  # autograd needs the outputs of some nonlinearities as they were
            out = out * hidden if out.requires_grad else out.mul_(hidden)
        return out if self.ln is None else self.ln(out)

    def write(self, hidden: Tensor) -> Tensor:
        """The hidden layer after the nonlinearity [n, d_mlp] -> what the MLP writes [n, d]."""
        return linear(hidden, self.W_out, self.b_out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, i] @ weight [i, o] + bias [o]"""
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def allowed_keys(query: Tensor, key: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """Which keys a query may see: bool [..., P, T], or None when all of them.

    query: integer positions [..., P]; key: integer positions [T].
    """
    if not causal and window is None:
        return None
    distance = query[..., :, None] - key
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        allowed &= distance >= 0
    if window is not None:
        allowed &= distance.abs() < window
    return allowed
