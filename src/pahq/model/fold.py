"""TransformerLens' simplifications of the weights, as pure functions. None changes a log-probability.

Folded norms simply lack their weights afterwards; the rest keeps its names.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pahq.errors import PahqError
from pahq.model.config import ModelConfig

Weights = dict[str, Tensor]


def fold_layer_norm(cfg: ModelConfig, weights: Mapping[str, Tensor]) -> tuple[ModelConfig, Weights]:
    """Moves every norm's scale and bias into the linear maps that read it.

    For LayerNorm these maps' columns are centred as well: the norm's output has mean zero, so the part of a map
    that reads its mean is dead. Query/key norms act after the map and stay as they are.
    """
    out = dict(weights)
    layer_norm = cfg.norm == "layer"

    def fold(norm: str, maps: list[tuple[str, str]], centre: bool = layer_norm) -> None:
        scale, shift = out.pop(f"{norm}.w", None), out.pop(f"{norm}.b", None)
        for weight_name, bias_name in maps:
            weight = out[weight_name]  # [..., d, out]
            if shift is not None:
                moved = (shift[:, None] * weight).sum(-2)
                out[bias_name] = out[bias_name] + moved if bias_name in out else moved
            if scale is not None:
                weight = scale[:, None] * weight
            out[weight_name] = weight - weight.mean(-2, keepdim=True) if centre else weight

    if cfg.norm != "none":
        if cfg.positions == "shortformer":
            raise PahqError(
                "fold_ln: shortformer positions are added after the norm, so that it cannot be folded; leave it off"
            )
        for layer in range(cfg.n_layers):
            at = f"blocks.{layer}"
            fold(f"{at}.ln1", [(f"{at}.attn.W_{x}", f"{at}.attn.b_{x}") for x in "QKV"])
            if cfg.d_mlp:
                parts = ("in", "gate") if cfg.gated else ("in",)
                fold(f"{at}.ln2", [(f"{at}.mlp.W_{x}", f"{at}.mlp.b_{x}") for x in parts])
        fold("ln_final", [("unembed.W_U", "unembed.b_U")])
    if cfg.act == "solu_ln":
        for layer in range(cfg.n_layers):
            at = f"blocks.{layer}.mlp"
            fold(f"{at}.ln", [(f"{at}.W_out", f"{at}.b_out")], centre=True)
    return cfg, out


def center_writing_weights(cfg: ModelConfig, weights: Mapping[str, Tensor]) -> tuple[ModelConfig, Weights]:
    """Takes the mean over d_model out of everything written to the residual stream.

    Only LayerNorm, which removes that mean itself, allows it; raises PahqError for other models.
    """
    if cfg.norm != "layer":
        raise PahqError(
            f"center_writing: {cfg.name} has no LayerNorm (its norm is '{cfg.norm}'), so that centring would "
            "change its output; leave it off"
        )
    out = dict(weights)
    names = ["embed.W_E"] + (["pos_embed.W_pos"] if cfg.positions == "learned" else [])
    for layer in range(cfg.n_layers):
        names += [f"blocks.{layer}.attn.{x}" for x in ("W_O", "b_O")]
        names += [f"blocks.{layer}.mlp.{x}" for x in ("W_out", "b_out")]
    for name in names:
        if name in out:
            out[name] = out[name] - out[name].mean(-1, keepdim=True)
    return cfg, out


def center_unembed(cfg: ModelConfig, weights: Mapping[str, Tensor]) -> tuple[ModelConfig, Weights]:
    """Takes the mean over the vocabulary out of the unembedding: logits shift by a constant a position."""
    out = dict(weights)
    for name in ("unembed.W_U", "unembed.b_U"):
        if name in out:
            out[name] = out[name] - out[name].mean(-1, keepdim=True)
    return cfg, out


def fold_value_biases(cfg: ModelConfig, weights: Mapping[str, Tensor]) -> tuple[ModelConfig, Weights]:
    """Moves every layer's value biases into its output bias, where no edge carries them.

    A head's attention adds up to one, so that it passes its value bias on whole: b_O gains the sum over heads of
    b_V @ W_O, a group's b_V through each of its heads. b_V is gone afterwards.
    """
    out = dict(weights)
    for layer in range(cfg.n_layers):
        at = f"blocks.{layer}.attn"
        values = out.pop(f"{at}.b_V", None)  # [G, dh]
        if values is None:
            continue
        moved = (values.repeat_interleave(cfg.group_size, dim=0)[:, None] @ out[f"{at}.W_O"]).sum((0, 1))
        out[f"{at}.b_O"] = out[f"{at}.b_O"] + moved if f"{at}.b_O" in out else moved
    return cfg, out
