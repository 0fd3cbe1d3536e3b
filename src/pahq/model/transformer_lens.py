"""TransformerLens models: its weight names are ours, so this is mostly a matter of configuration.

Objects are recognised by their attributes; the library itself is never imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.model.architectures import convert_config, rope_frequencies
from pahq.model.config import ModelConfig
from pahq.model.sources import checked
from pahq.model.transformer import shapes

NORMS: dict[Any, tuple[str, bool]] = {  # normalization_type -> (our norm, has weights)
    None: ("none", False),
    "LN": ("layer", True),
    "LNPre": ("layer", False),
    "RMS": ("rms", True),
    "RMSPre": ("rms", False),
}
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "silu": "silu",
    "solu": "solu",
    "solu_ln": "solu_ln",
}
POSITIONS = {"standard": "learned", "rotary": "rotary", "shortformer": "shortformer", "none": "none", None: "none"}

# Settings that change the computation and that the model core does not have: name -> the value that is off.
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_experts": (None, 0),
    "post_embedding_ln": (None, False),
    "use_normalization_before_and_after": (None, False),
    "rmsnorm_uses_offset": (None, False),
    "qk_norm_after_rope": (None, False),
    "attn_scores_soft_cap": (None, 0, -1.0),
    "output_logits_soft_cap": (None, 0, -1.0),
}
BUFFERS = (".mask", ".IGNORE", ".rotary_sin", ".rotary_cos", ".alibi")


def is_lens_config(config: Any) -> bool:
    """Whether a configuration (object or mapping) speaks TransformerLens' language."""
    return (isinstance(config, Mapping) and "d_model" in config) or hasattr(config, "normalization_type")


def read_lens_object(model: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A HookedTransformer, or a TransformerBridge (which wraps a ``transformers`` model)."""
    hf = getattr(getattr(model, "original_model", None), "config", None)
    if hf is not None and hasattr(hf, "model_type"):
        return read_bridge(model, hf)
    return read_lens(model.state_dict(), model.cfg)


def read_lens(state: Mapping[str, Tensor], config: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A state dict in TransformerLens' names with its configuration, an object or a mapping.

    Raises PahqError for settings the model core does not have and for weights that do not fit.
    """
    get = config.get if isinstance(config, Mapping) else lambda key, default=None: getattr(config, key, default)
    cfg = lens_config(get)
    weights: dict[str, Tensor] = {}
    table = shapes(cfg)
    for name, weight in state.items():
        if name.endswith(BUFFERS):
            continue
        ours = name.replace("attn._W_", "attn.W_").replace("attn._b_", "attn.b_")  # grouped keys and values
        weights[ours] = checked(weight, name, table[ours][0], "state dict") if ours in table else weight.detach()
    if get("scale_attn_by_inverse_layer_idx"):
        scale_by_layer(cfg, weights)
    if cfg.gated:
        move_gated_bias(cfg, weights)
    if cfg.positions == "rotary":
        weights["rotary.inv_freq"] = lens_frequencies(state, get, cfg)
    return cfg, weights


def move_gated_bias(cfg: ModelConfig, weights: dict[str, Tensor]) -> None:
    """TransformerLens adds a gated MLP's b_in after the gate, where it is a constant of the output: into b_out."""
    for layer in range(cfg.n_layers):
        at = f"blocks.{layer}.mlp"
        bias = weights.pop(f"{at}.b_in", None)
        if bias is not None and bias.any():
            moved = bias @ weights[f"{at}.W_out"]
            weights[f"{at}.b_out"] = weights[f"{at}.b_out"] + moved if f"{at}.b_out" in weights else moved


def lens_config(get: Any) -> ModelConfig:
    """TransformerLens' settings, looked up by ``get(name, default)`` -> ModelConfig."""
    for key, off in REFUSED.items():
        if get(key) not in off:
            raise PahqError(f"TransformerLens model: {key}={get(key)} is not supported; the model must do without")
    norm = known(get, "normalization_type", NORMS)[0]
    if get("final_rms") and norm != "rms":
        raise PahqError("TransformerLens model: final_rms=True with another norm in the blocks is not supported")
    attn_only = bool(get("attn_only"))
    required = ("n_layers", "d_model", "d_head", "n_ctx", "d_vocab")
    missing = [key for key in required if get(key) is None]
    if missing:
        raise PahqError(f"TransformerLens configuration: '{missing[0]}' is missing; give the whole configuration")
    n_heads = get("n_heads") if (get("n_heads") or -1) > 0 else get("d_model") // get("d_head")
    positions = known(get, "positional_embedding_type", POSITIONS, "standard")
    out = get("d_vocab_out")
    return ModelConfig(
        n_layers=get("n_layers"),
        n_heads=n_heads,
        n_kv_heads=get("n_key_value_heads") or n_heads,
        d_model=get("d_model"),
        d_head=get("d_head"),
        d_mlp=0 if attn_only else (get("d_mlp") or 4 * get("d_model")),
        d_vocab=get("d_vocab"),
        d_vocab_out=out if out is not None and out > 0 else get("d_vocab"),
        n_ctx=get("n_ctx"),
        positions=positions,
        rotary_dim=(get("rotary_dim") or get("d_head")) if positions == "rotary" else 0,
        rotary_interleaved=bool(get("rotary_adjacent_pairs")),
        norm=norm,
        norm_eps=get("eps") if get("eps") is not None else 1e-5,
        act="relu" if attn_only else known(get, "act_fn", ACTIVATIONS),
        gated=bool(get("gated_mlp")) and not attn_only,
        parallel=bool(get("parallel_attn_mlp")),
        causal=known(get, "attention_dir", {"causal": True, "bidirectional": False}, "causal"),
        qk_norm=bool(get("use_qk_norm")),
        attn_scale=lens_scale(get),
        window=lens_window(get),
        name=get("model_name") or get("name") or "transformer-lens",
        architecture="transformer-lens",
    )


def known(get: Any, key: str, table: Mapping[Any, Any], default: Any = None) -> Any:
    value = get(key, default)
    if value not in table:
        names = ", ".join(str(name) for name in table)
        raise PahqError(f"TransformerLens model: {key}='{value}' is not supported; supported: {names}")
    return table[value]


def lens_scale(get: Any) -> float | None:
    """TransformerLens divides scores by attn_scale; -1 stands for the usual square root."""
    if get("use_attn_scale") is False:
        return 1.0
    scale = get("attn_scale")
    return 1.0 / scale if scale is not None and scale > 0 else None


def lens_window(get: Any) -> int | None:
    if not get("use_local_attn"):
        return None
    if set(get("attn_types") or []) != {"local"}:
        raise PahqError("TransformerLens model: a mix of local and global attention layers is not supported")
    return get("window_size")


def lens_frequencies(state: Mapping[str, Tensor], get: Any, cfg: ModelConfig) -> Tensor:
    """Inverse frequencies [rotary_dim / 2]; scaled ones are read off the model's own angle at position 1."""
    if get("use_NTK_by_parts_rope") or get("use_yarn_rope"):
        name = "blocks.0.attn.rotary_sin"
        if name not in state:
            raise PahqError(f"TransformerLens model: scaled rotary positions need the buffer '{name}'; keep it")
        angles = torch.atan2(state[name][1].double(), state["blocks.0.attn.rotary_cos"][1].double()).float()
        return angles[0::2] if cfg.rotary_interleaved else angles[: cfg.rotary_dim // 2]
    half = torch.arange(cfg.rotary_dim // 2, dtype=torch.float32)
    return 1.0 / (float(get("rotary_base") or 10000) ** (half / (cfg.rotary_dim / 2)))


def read_bridge(model: Any, hf: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A TransformerBridge: weights by its TransformerLens-style properties, settings from the wrapped model.

    What the bridge did to the weights (folding, centring) is therefore kept.
    """
    cfg = convert_config(hf)
    weights: dict[str, Tensor | None] = {"embed.W_E": model.W_E, "unembed.W_U": model.W_U, "unembed.b_U": model.b_U}
    if cfg.positions == "learned":
        weights["pos_embed.W_pos"] = model.W_pos[-cfg.n_ctx :]  # OPT's table starts with two unused rows
    norms = {name: weight for name, weight in model.state_dict().items() if ".weight" in name or ".bias" in name}
    for layer, block in enumerate(model.blocks):
        at = f"blocks.{layer}"
        weights |= {f"{at}.attn.{x}": getattr(block.attn, x, None) for x in ("W_Q", "W_K", "W_V", "W_O")}
        weights |= {f"{at}.attn.{x}": getattr(block.attn, x, None) for x in ("b_Q", "b_K", "b_V", "b_O")}
        names = ("W_in", "W_out", "b_in", "b_out") + (("W_gate", "b_gate") if cfg.gated else ())
        weights |= {f"{at}.mlp.{x}": getattr(block.mlp, x, None) for x in names}
        norms |= {  # GPT-J's one norm serves both halves
            name.replace("ln1", "ln2"): norms[name]
            for name in (f"{at}.ln1.weight", f"{at}.ln1.bias")
            if f"{at}.ln2.weight" not in norms and name in norms
        }
    table = shapes(cfg)
    for name in table:
        stem, _, part = name.rpartition(".")
        stored = f"{stem}.{ {'w': 'weight', 'b': 'bias'}.get(part) }"
        if stored in norms:
            weights[name] = norms[stored]
    found = {name: weight for name, weight in weights.items() if weight is not None}
    if getattr(hf, "scale_attn_by_inverse_layer_idx", False):
        scale_by_layer(cfg, found)
    if cfg.positions == "rotary":
        found["rotary.inv_freq"] = rope_frequencies(hf, cfg)
    return cfg, {name: checked(w, name, table[name][0], "TransformerBridge") for name, w in found.items()}


def scale_by_layer(cfg: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Scores of layer l are divided by l + 1: the queries take it on."""
    for layer in range(cfg.n_layers):
        for name in (f"blocks.{layer}.attn.W_Q", f"blocks.{layer}.attn.b_Q"):
            if name in weights:
                weights[name] = weights[name] / (layer + 1)


def load_npz(file: str | Path, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """A NumPy archive of weights in TransformerLens' names -> the pair that ``load_model`` takes."""
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}, config
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise PahqError(f"weights file {file}: not a readable .npz archive ({error}); check the path") from None
