"""What a decoder-only transformer looks like, as one frozen value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from pahq.errors import PahqError

Positions = Literal["none", "learned", "rotary", "shortformer"]
NormKind = Literal["none", "layer", "rms"]
Activation = Literal["relu", "gelu", "gelu_new", "gelu_quick", "silu", "solu", "solu_ln"]


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of one model. Names follow TransformerLens where it has one.

    n_kv_heads: key/value heads (grouped-query attention); equals n_heads otherwise.
    d_mlp: 0 for attention-only models.
    positions: ``learned`` adds W_pos to the embedding, ``shortformer`` adds it to the
        normalised input of queries and keys only, ``rotary`` turns queries and keys.
    rotary_dim: leading coordinates of a head that are turned (<= d_head).
    rotary_interleaved: pairs are (0, 1), (2, 3), … (GPT-J) instead of (i, i + rotary_dim / 2).
    rotary_scale: factor on cos and sin (some context-extension schemes).
    norm: ``layer`` (centre, scale), ``rms`` (scale) or ``none``; weights and biases are optional
        tensors of the weight dictionary, so that folded models simply lack them.
    gated: MLP computes act(x W_gate) * (x W_in).
    parallel: attention and MLP of one block read the same residual stream (NeoX, GPT-J).
    attn_scale: factor on the scores before the softmax.
    window: sliding-window attention: a query sees this many keys, its own included.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    d_vocab_out: int
    n_ctx: int
    positions: Positions = "learned"
    rotary_dim: int = 0
    rotary_interleaved: bool = False
    rotary_scale: float = 1.0
    norm: NormKind = "layer"
    norm_eps: float = 1e-5
    act: Activation = "gelu_new"
    gated: bool = False
    parallel: bool = False
    causal: bool = True
    qk_norm: bool = False
    attn_scale: float | None = None
    window: int | None = None
    name: str = "model"
    architecture: str = "custom"

    def __post_init__(self) -> None:
        for field in ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_vocab", "d_vocab_out", "n_ctx"):
            if getattr(self, field) < 1:
                raise PahqError(f"model configuration: {field} is {getattr(self, field)}; it must be at least 1")
        if self.d_mlp < 0:
            raise PahqError(f"model configuration: d_mlp is {self.d_mlp}; give 0 for an attention-only model")
        if self.n_heads % self.n_kv_heads:
            raise PahqError(
                f"model configuration: {self.n_heads} heads do not divide into {self.n_kv_heads} key/value groups"
            )
        for field, allowed in (("positions", Positions), ("norm", NormKind), ("act", Activation)):
            if getattr(self, field) not in get_args(allowed):
                raise PahqError(
                    f"model configuration: {field} '{getattr(self, field)}' is unknown; "
                    f"known: {', '.join(get_args(allowed))}"
                )
        if self.positions == "rotary" and not 0 < self.rotary_dim <= self.d_head:
            raise PahqError(
                f"model configuration: rotary_dim {self.rotary_dim} must lie between 1 and d_head ({self.d_head})"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def scale(self) -> float:
        """The factor applied to attention scores."""
        return self.d_head**-0.5 if self.attn_scale is None else self.attn_scale

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return asdict(self)
