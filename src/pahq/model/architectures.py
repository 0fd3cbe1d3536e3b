"""The supported ``transformers`` architectures, a table row and a configuration function each.

Everything is read by the attribute names of ``transformers`` configurations and by the weight names of its
causal language models, whatever the file format: GGUF metadata is translated to these first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.model.config import Activation, ModelConfig
from pahq.model.sources import Source

ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "quick_gelu": "gelu_quick",
    "silu": "silu",
    "swish": "silu",
}

# Frequencies of these do not depend on the prompt's length.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Architecture:
    """How one architecture is configured and what its weights are called.

    config: a ``transformers`` configuration -> ModelConfig.
    biases: a ``transformers`` configuration -> the linear maps (keys of ``linear``) that have a bias.
    prefix: what stands before the body's names; block: before a layer's ("{}" is its number).
    linear: q, k, v (or qkv), o, in, out, gate -> weight name in the block.
    qkv: how a fused qkv map is laid out: "thirds" [Q; K; V] or "heads" [q0; k0; v0; q1; …].
    transposed: weights are stored [in, out].
    """

    title: str
    config: Callable[[Any], ModelConfig]
    biases: Callable[[Any], str]
    prefix: str
    block: str
    embed: str
    ln1: str
    ln2: str
    ln_final: str
    linear: dict[str, str]
    pos: str | None = None
    pos_offset: int = 0
    qkv: str = "thirds"
    transposed: bool = False


def refuse(what: str, why: str) -> PahqError:
    return PahqError(f"model: {what} is not supported: {why}; supported: {supported()}")


def supported() -> str:
    return ", ".join(arch.title for arch in ARCHITECTURES.values())


def lookup(model_type: str | None) -> Architecture:
    """The architecture of a ``transformers`` model type; raises PahqError if it is not supported."""
    if model_type not in ARCHITECTURES:
        raise PahqError(f"model: the architecture '{model_type}' is not supported; supported: {supported()}")
    return ARCHITECTURES[model_type]


def convert_config(hf: Any) -> ModelConfig:
    """A ``transformers`` configuration -> ours; raises PahqError for what the model core cannot run."""
    arch = lookup(getattr(hf, "model_type", None))
    if getattr(hf, "quantization_config", None):
        raise refuse(f"a quantised {arch.title} model", "its weights are packed; give the unquantised model")
    return arch.config(hf)


def convert(hf: Any, source: Source) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A ``transformers`` configuration and its weights -> ours (see ``transformer.shapes``).

    Weights may be views of the source's. A tied unembedding is left out: see ``finish``.
    Raises PahqError for what the model core cannot run and for weights that do not fit.
    """
    arch = lookup(getattr(hf, "model_type", None))
    cfg = convert_config(hf)
    weights = read_weights(arch, hf, cfg, source)
    tied = bool(getattr(hf, "tie_word_embeddings", False))
    lm_head = next((name for name in ("lm_head", "embed_out") if source.has(f"{name}.weight")), "lm_head")
    if not tied or source.has(f"{lm_head}.weight"):
        # A tied model's file may hold the same matrix twice: the embedding counts, as in transformers.
        unembedding = source.take(f"{lm_head}.weight", (cfg.d_vocab_out, cfg.d_model))
        if not tied:
            weights["unembed.W_U"] = unembedding.T
    if source.has(f"{lm_head}.bias"):
        weights["unembed.b_U"] = source.take(f"{lm_head}.bias", (cfg.d_vocab_out,))
    if cfg.positions == "rotary":
        weights["rotary.inv_freq"] = rope_frequencies(hf, cfg)
    buffers = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
    unknown = [name for name in source.left() if not buffers.search(name)]
    if unknown:
        raise PahqError(
            f"weights: '{unknown[0]}' ({len(unknown)} in all) has no place in {arch.title}; "
            "give a plain causal language model, adapters merged"
        )
    return cfg, weights


def read_weights(arch: Architecture, hf: Any, cfg: ModelConfig, source: Source) -> dict[str, Tensor]:
    """Embeddings, blocks and final norm under our names."""
    d, dh, mlp = cfg.d_model, cfg.d_head, cfg.d_mlp
    heads = {"q": cfg.n_heads, "k": cfg.n_kv_heads, "v": cfg.n_kv_heads}
    biased = arch.biases(hf).split()
    weights: dict[str, Tensor] = {"embed.W_E": source.take(arch.prefix + arch.embed, (cfg.d_vocab, d))}
    if arch.pos:
        table = source.take(arch.prefix + arch.pos, (cfg.n_ctx + arch.pos_offset, d))
        weights["pos_embed.W_pos"] = table[arch.pos_offset :]

    def linear(at: str, part: str, n_in: int, n_out: int) -> tuple[Tensor, Tensor | None]:
        """Weight [in, out] and bias [out] of one linear map."""
        name = at + arch.linear[part]
        weight = source.take(f"{name}.weight", (n_in, n_out) if arch.transposed else (n_out, n_in))
        bias = source.take(f"{name}.bias", (n_out,)) if part in biased else None
        return weight if arch.transposed else weight.T, bias

    def put(name: str, pair: tuple[Tensor, Tensor | None], weight: str, bias: str) -> None:
        weights[f"{name}.{weight}"] = pair[0]
        if pair[1] is not None:
            weights[f"{name}.{bias}"] = pair[1]

    def norm(ours: str, theirs: str, width: int = d, plain: bool = cfg.norm == "rms") -> None:
        if getattr(hf, "layer_norm_elementwise_affine", True):
            weights[f"{ours}.w"] = source.take(f"{theirs}.weight", (width,))
            if not plain:
                weights[f"{ours}.b"] = source.take(f"{theirs}.bias", (width,))

    for layer in range(cfg.n_layers):
        at, ours = arch.prefix + arch.block.format(layer), f"blocks.{layer}"
        if "qkv" in arch.linear:
            maps = split_qkv(*linear(at, "qkv", d, 3 * cfg.n_heads * dh), cfg, arch.qkv)
        else:
            maps = {x: by_head(*linear(at, x, d, n * dh), n) for x, n in heads.items()}
        for x, pair in maps.items():
            put(f"{ours}.attn", pair, f"W_{x.upper()}", f"b_{x.upper()}")
        weight, bias = linear(at, "o", cfg.n_heads * dh, d)
        put(f"{ours}.attn", (weight.reshape(cfg.n_heads, dh, d), bias), "W_O", "b_O")
        if getattr(hf, "scale_attn_by_inverse_layer_idx", False):  # scores of layer l are divided by l + 1
            for name in ("W_Q", "b_Q"):
                weights[f"{ours}.attn.{name}"] = weights[f"{ours}.attn.{name}"] / (layer + 1)
        for x in "qk" if cfg.qk_norm else "":
            norm(f"{ours}.attn.{x}_norm", f"{at}self_attn.{x}_norm", dh)
        for part in ("in", "gate") if cfg.gated else ("in",):
            put(f"{ours}.mlp", linear(at, part, d, mlp), f"W_{part}", f"b_{part}")
        put(f"{ours}.mlp", linear(at, "out", mlp, d), "W_out", "b_out")
        norm(f"{ours}.ln1", at + arch.ln1)
        if arch.ln2 == arch.ln1:  # one norm feeds both halves of a parallel block
            weights |= {f"{ours}.ln2.{part}": weights[f"{ours}.ln1.{part}"].clone() for part in "wb"}
        else:
            norm(f"{ours}.ln2", at + arch.ln2)
    norm("ln_final", arch.prefix + arch.ln_final)
    return weights


def by_head(weight: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, Tensor | None]:
    """[d, heads * dh] and [heads * dh] -> [heads, d, dh] and [heads, dh]"""
    weight = weight.reshape(weight.shape[0], heads, -1).permute(1, 0, 2)
    return weight, None if bias is None else bias.reshape(heads, -1)


def split_qkv(
    weight: Tensor, bias: Tensor | None, cfg: ModelConfig, layout: str
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """A fused map [d, 3 * heads * dh] -> q, k and v by head."""
    shape, axis = ((3, cfg.n_heads, cfg.d_head), -3) if layout == "thirds" else ((cfg.n_heads, 3, cfg.d_head), -2)
    weights = weight.reshape(-1, *shape).unbind(axis)
    biases = [None] * 3 if bias is None else bias.reshape(shape).unbind(axis)
    return {x: (w.permute(1, 0, 2), b) for x, w, b in zip("qkv", weights, biases, strict=True)}


def finish(
    weights: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype, copy: bool = False
) -> dict[str, Tensor]:
    """Weights on their device, contiguous, in ``dtype``; a missing unembedding is tied to the embedding.

    copy: never share memory with the source (a live model that may be trained further).
    """
    done = {}
    for name, weight in weights.items():
        kind = torch.float32 if name == "rotary.inv_freq" else dtype
        new = weight.to(device=device, dtype=kind).contiguous()
        done[name] = new.clone() if copy and new.data_ptr() == weight.data_ptr() else new
    done.setdefault("unembed.W_U", done["embed.W_E"].T)
    return done


# Configurations. Attribute names are common to all architectures by transformers' own aliases.


def common(hf: Any, title: str, **rest: Any) -> ModelConfig:
    """What all architectures share; ``rest`` overrides."""
    act = getattr(hf, "hidden_act", None) or getattr(hf, "activation_function", None)
    if act not in ACTIVATIONS:
        raise refuse(f"{title} with the activation '{act}'", f"known are {', '.join(ACTIVATIONS)}")
    if getattr(hf, "add_cross_attention", False):
        raise refuse(f"{title} with cross-attention", "only decoders are")
    heads, d = hf.num_attention_heads, hf.hidden_size
    vocab = hf.vocab_size
    fields: dict[str, Any] = {
        "n_layers": hf.num_hidden_layers,
        "n_heads": heads,
        "n_kv_heads": getattr(hf, "num_key_value_heads", None) or heads,
        "d_model": d,
        "d_head": getattr(hf, "head_dim", None) or d // heads,
        "d_vocab": vocab,
        "d_vocab_out": vocab,
        "n_ctx": hf.max_position_embeddings,
        "act": ACTIVATIONS[act],
        "name": getattr(hf, "_name_or_path", "") or hf.model_type,
        "architecture": hf.model_type,
    }
    return ModelConfig(**(fields | rest))


def gpt2_config(hf: Any) -> ModelConfig:
    return common(
        hf,
        "GPT-2",
        d_mlp=hf.n_inner or 4 * hf.hidden_size,
        norm_eps=hf.layer_norm_epsilon,
        attn_scale=None if hf.scale_attn_weights else 1.0,
    )


def neox_config(hf: Any) -> ModelConfig:
    return common(
        hf,
        "GPT-NeoX",
        d_mlp=hf.intermediate_size,
        norm_eps=hf.layer_norm_eps,
        parallel=hf.use_parallel_residual,
        positions="rotary",
        **rope_fields(hf),
    )


def gptj_config(hf: Any) -> ModelConfig:
    return common(
        hf,
        "GPT-J",
        d_mlp=hf.n_inner or 4 * hf.hidden_size,
        norm_eps=hf.layer_norm_epsilon,
        parallel=True,
        positions="rotary",
        rotary_dim=hf.rotary_dim or hf.hidden_size // hf.num_attention_heads,
        rotary_interleaved=True,
    )


def opt_config(hf: Any) -> ModelConfig:
    if not hf.do_layer_norm_before or getattr(hf, "_remove_final_layer_norm", False):
        raise refuse("OPT with its norms after the blocks (as in OPT-350m)", "only pre-norm models are")
    if hf.word_embed_proj_dim != hf.hidden_size:
        raise refuse("OPT with projected embeddings (as in OPT-350m)", "embeddings must be d_model wide")
    return common(hf, "OPT", d_mlp=hf.ffn_dim)


def llama_config(hf: Any) -> ModelConfig:
    """Llama, Mistral, Qwen2 and Qwen3."""
    title = ARCHITECTURES[hf.model_type].title
    window = getattr(hf, "sliding_window", None)
    kinds = set(getattr(hf, "layer_types", None) or [])
    if len(kinds) > 1 or kinds - {"full_attention", "sliding_attention"}:
        raise refuse(f"{title} with layers of several kinds ({', '.join(sorted(kinds))})", "all must be alike")
    if kinds == {"full_attention"} or (window is not None and window >= hf.max_position_embeddings):
        window = None
    return common(
        hf,
        title,
        d_mlp=hf.intermediate_size,
        norm="rms",
        norm_eps=hf.rms_norm_eps,
        gated=True,
        positions="rotary",
        qk_norm=hf.model_type == "qwen3",
        window=window,
        **rope_fields(hf),
    )


def rope_settings(hf: Any) -> dict[str, Any]:
    """The rotary settings of a configuration; raises PahqError for kinds that depend on the prompt's length."""
    settings = dict(getattr(hf, "rope_parameters", None) or {})
    kind = settings.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise refuse(f"the rotary scaling '{kind}'", f"known are {', '.join(ROPE_TYPES)}")
    return settings


def rope_fields(hf: Any) -> dict[str, Any]:
    """rotary_dim and rotary_scale from a configuration with ``rope_parameters``."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = rope_settings(hf)
    d_head = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    kind = settings.get("rope_type", "default")
    scale = 1.0 if kind == "default" else float(ROPE_INIT_FUNCTIONS[kind](hf)[1])
    return {"rotary_dim": int(d_head * settings.get("partial_rotary_factor", 1.0)), "rotary_scale": scale}


def rope_frequencies(hf: Any, cfg: ModelConfig) -> Tensor:
    """Inverse frequencies [rotary_dim / 2], float32, by transformers' own functions where they are scaled."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = rope_settings(hf)
    kind = settings.get("rope_type", "default")
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](hf)[0].float()
    exponents = torch.arange(0, cfg.rotary_dim, 2, dtype=torch.int64).float() / cfg.rotary_dim
    return 1.0 / (float(settings.get("rope_theta", 10000.0)) ** exponents)


_LLAMA: dict[str, Any] = {
    "config": llama_config,
    "prefix": "model.",
    "block": "layers.{}.",
    "embed": "embed_tokens.weight",
    "ln1": "input_layernorm",
    "ln2": "post_attention_layernorm",
    "ln_final": "norm",
    "linear": {x: f"self_attn.{x}_proj" for x in "qkvo"}
    | {"in": "mlp.up_proj", "gate": "mlp.gate_proj", "out": "mlp.down_proj"},
}


def _llama_biases(hf: Any) -> str:
    attention = getattr(hf, "attention_bias", False)
    return ("q k v o " if attention else "") + ("in gate out" if getattr(hf, "mlp_bias", False) else "")


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        "GPT-2",
        gpt2_config,
        lambda hf: "qkv o in out",
        prefix="transformer.",
        block="h.{}.",
        embed="wte.weight",
        pos="wpe.weight",
        ln1="ln_1",
        ln2="ln_2",
        ln_final="ln_f",
        linear={"qkv": "attn.c_attn", "o": "attn.c_proj", "in": "mlp.c_fc", "out": "mlp.c_proj"},
        transposed=True,
    ),
    "gpt_neox": Architecture(
        "GPT-NeoX/Pythia",
        neox_config,
        lambda hf: "qkv o in out" if getattr(hf, "attention_bias", True) else "in out",
        prefix="gpt_neox.",
        block="layers.{}.",
        embed="embed_in.weight",
        ln1="input_layernorm",
        ln2="post_attention_layernorm",
        ln_final="final_layer_norm",
        linear={
            "qkv": "attention.query_key_value",
            "o": "attention.dense",
            "in": "mlp.dense_h_to_4h",
            "out": "mlp.dense_4h_to_h",
        },
        qkv="heads",
    ),
    "gptj": Architecture(
        "GPT-J",
        gptj_config,
        lambda hf: "in out",
        prefix="transformer.",
        block="h.{}.",
        embed="wte.weight",
        ln1="ln_1",
        ln2="ln_1",
        ln_final="ln_f",
        linear={x: f"attn.{x}_proj" for x in "qkv"} | {"o": "attn.out_proj", "in": "mlp.fc_in", "out": "mlp.fc_out"},
    ),
    "opt": Architecture(
        "OPT",
        opt_config,
        lambda hf: "q k v o in out" if hf.enable_bias else "",
        prefix="model.decoder.",
        block="layers.{}.",
        embed="embed_tokens.weight",
        pos="embed_positions.weight",
        pos_offset=2,
        ln1="self_attn_layer_norm",
        ln2="final_layer_norm",
        ln_final="final_layer_norm",
        linear={x: f"self_attn.{x}_proj" for x in "qkv"} | {"o": "self_attn.out_proj", "in": "fc1", "out": "fc2"},
    ),
    "llama": Architecture("Llama/SmolLM2", biases=_llama_biases, **_LLAMA),
    "mistral": Architecture("Mistral", biases=_llama_biases, **_LLAMA),
    "qwen2": Architecture("Qwen2/Qwen2.5", biases=lambda hf: "q k v", **_LLAMA),
    "qwen3": Architecture("Qwen3", biases=_llama_biases, **_LLAMA),
}
