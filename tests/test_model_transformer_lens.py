"""TransformerLens models: recorded logits, settings, weights under its names, bridges, folding."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pahq.errors import PahqError
from pahq.model import load_model
from pahq.model.config import ModelConfig
from pahq.model.fold import fold_value_biases
from pahq.model.transformer import build
from pahq.model.transformer_lens import load_npz
from random_models import random_weights
from test_model_architectures import CASES, TOKENS, random_model, reference

GOLDEN = Path(os.environ.get("PAHQ_GOLDEN", Path(__file__).parent.parent / "../shared/golden"))


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no recorded runs in {GOLDEN}; name a folder in PAHQ_GOLDEN")
@pytest.mark.parametrize("case", sorted(path.parent.name for path in GOLDEN.glob("*/config.json")))
def test_recorded_logits(case: str) -> None:
    settings = json.loads((GOLDEN / case / "config.json").read_text())
    weights = load_npz(GOLDEN / case / settings.get("weights", "weights.npz"), settings["model_cfg"])
    recorded = np.load(GOLDEN / case / "io.npz")
    expected = torch.from_numpy(recorded["clean_logits"])
    model = load_model(weights, dtype=expected.dtype)
    logits = model.forward(torch.from_numpy(recorded["clean"]))
    assert (logits - expected).abs().max() < 1e-4


BASE: dict[str, Any] = {
    "n_layers": 2,
    "n_heads": 4,
    "d_model": 24,
    "d_head": 6,
    "d_mlp": 40,
    "n_ctx": 20,
    "d_vocab": 61,
    "act_fn": "gelu_new",
    "normalization_type": "LN",
    "eps": 1e-5,
}
LLAMA: dict[str, Any] = {
    "n_key_value_heads": 2,
    "positional_embedding_type": "rotary",
    "rotary_dim": 6,
    "normalization_type": "RMS",
    "gated_mlp": True,
    "act_fn": "silu",
    "final_rms": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "LN": {},
    "LNPre": {"normalization_type": "LNPre"},
    "RMS": {"normalization_type": "RMS"},
    "RMSPre": {"normalization_type": "RMSPre"},
    "no norm": {"normalization_type": None},
    "attention only": {"attn_only": True, "act_fn": None},
    "solu": {"act_fn": "solu_ln"},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "no positions": {"positional_embedding_type": "none"},
    "rotary": {"positional_embedding_type": "rotary", "rotary_dim": 4, "parallel_attn_mlp": True},
    "interleaved": {"positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_adjacent_pairs": True},
    "bidirectional": {"attention_dir": "bidirectional", "act_fn": "relu"},
    "window": {"use_local_attn": True, "window_size": 5, "attn_types": ["local", "local"]},
    "unscaled": {"use_attn_scale": False},
    "own scale": {"attn_scale": 2.0},
    "by layer": {"scale_attn_by_inverse_layer_idx": True},
    "grouped": LLAMA,
    "query and key norms": {**LLAMA, "use_qk_norm": True},
    "classes": {"d_vocab_out": 7},
}


def lens_state(cfg: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights under TransformerLens' names, buffers included."""
    d, dh, heads, mlp = cfg["d_model"], cfg["d_head"], cfg["n_heads"], cfg["d_mlp"]
    groups = cfg.get("n_key_value_heads")
    out = cfg.get("d_vocab_out", cfg["d_vocab"])
    table: dict[str, tuple[int, ...]] = {
        "embed.W_E": (cfg["d_vocab"], d),
        "unembed.W_U": (d, out),
        "unembed.b_U": (out,),
    }
    if cfg.get("positional_embedding_type", "standard") in ("standard", "shortformer"):
        table["pos_embed.W_pos"] = (cfg["n_ctx"], d)
    norms = {"LN": "wb", "RMS": "w"}.get(cfg["normalization_type"] or "", "")
    mark = "_" if groups else ""
    for layer in range(cfg["n_layers"]):
        at = f"blocks.{layer}"
        table |= {f"{at}.attn.W_Q": (heads, d, dh), f"{at}.attn.b_Q": (heads, dh)}
        table |= {f"{at}.attn.{mark}W_{x}": (groups or heads, d, dh) for x in "KV"}
        table |= {f"{at}.attn.{mark}b_{x}": (groups or heads, dh) for x in "KV"}
        table |= {f"{at}.attn.W_O": (heads, dh, d), f"{at}.attn.b_O": (d,), f"{at}.attn.mask": (20, 20)}
        table |= {f"{at}.ln{i}.{x}": (d,) for x in norms for i in ((1,) if cfg.get("attn_only") else (1, 2))}
        if cfg.get("use_qk_norm"):
            table |= {f"{at}.attn.{x}_norm.w": (dh,) for x in "qk"}
        if not cfg.get("attn_only"):
            table |= {f"{at}.mlp.W_in": (d, mlp), f"{at}.mlp.b_in": (mlp,)}
            table |= {f"{at}.mlp.W_out": (mlp, d), f"{at}.mlp.b_out": (d,)}
            if cfg.get("gated_mlp"):
                table[f"{at}.mlp.W_gate"] = (d, mlp)
            if cfg["act_fn"] == "solu_ln":
                table |= {f"{at}.mlp.ln.{x}": (mlp,) for x in norms}
    table |= {f"ln_final.{x}": (d,) for x in norms}
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in table.items():
        noise = torch.randn(shape, generator=generator)
        state[name] = 1 + 0.3 * noise if name.endswith(".w") else 0.3 * noise
    return state | {f"blocks.{layer}.attn.IGNORE": torch.tensor(-1e5) for layer in range(cfg["n_layers"])}


def lens_forward(cfg: dict[str, Any], state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The model TransformerLens describes, one head and one query position at a time: slow and obvious."""
    get = cfg.get
    kind = get("positional_embedding_type", "standard")

    def norm(name: str, x: Tensor, layer_norm: bool | None = None) -> Tensor:
        if cfg["normalization_type"] is None:
            return x
        if layer_norm or (layer_norm is None and cfg["normalization_type"].startswith("LN")):
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + cfg["eps"]).sqrt()
        return x * state.get(f"{name}.w", torch.tensor(1.0)) + state.get(f"{name}.b", torch.tensor(0.0))

    def turn(x: Tensor, position: int) -> Tensor:
        if kind != "rotary":
            return x
        x, half = x.clone(), cfg["rotary_dim"] // 2
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if get("rotary_adjacent_pairs") else (i, i + half)
            angle = position / 10000 ** (i / half)
            left, right = x[..., a].clone(), x[..., b].clone()
            x[..., a] = left * math.cos(angle) - right * math.sin(angle)
            x[..., b] = left * math.sin(angle) + right * math.cos(angle)
        return x

    acts = {"gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}
    acts["solu_ln"] = lambda x: x * x.softmax(-1)
    length, positions = tokens.shape[1], state.get("pos_embed.W_pos")
    x = state["embed.W_E"][tokens] + (positions[:length] if kind == "standard" and positions is not None else 0)
    for layer in range(cfg["n_layers"]):
        at = f"blocks.{layer}"
        normed = norm(f"{at}.ln1", x)
        shifted = normed + positions[:length] if kind == "shortformer" and positions is not None else normed
        attn = state[f"{at}.attn.b_O"].expand_as(x)
        for head in range(cfg["n_heads"]):
            group = head * get("n_key_value_heads", cfg["n_heads"]) // cfg["n_heads"]
            mark = "_" if get("n_key_value_heads") else ""
            q = shifted @ state[f"{at}.attn.W_Q"][head] + state[f"{at}.attn.b_Q"][head]
            k = shifted @ state[f"{at}.attn.{mark}W_K"][group] + state[f"{at}.attn.{mark}b_K"][group]
            v = normed @ state[f"{at}.attn.{mark}W_V"][group] + state[f"{at}.attn.{mark}b_V"][group]
            if get("use_qk_norm"):
                q, k = norm(f"{at}.attn.q_norm", q, False), norm(f"{at}.attn.k_norm", k, False)
            scale = get("attn_scale", math.sqrt(cfg["d_head"])) if get("use_attn_scale", True) else 1.0
            scale *= layer + 1 if get("scale_attn_by_inverse_layer_idx") else 1
            keys = torch.stack([turn(k[:, p], p) for p in range(length)], 1)
            for p in range(length):
                first = max(0, p + 1 - cfg["window_size"]) if get("use_local_attn") else 0
                last = length if get("attention_dir") == "bidirectional" else p + 1
                scores = (keys[:, first:last] @ turn(q[:, p], p)[:, :, None])[..., 0] / scale
                z = (scores.softmax(-1)[:, :, None] * v[:, first:last]).sum(1)
                attn = attn.clone()
                attn[:, p] += z @ state[f"{at}.attn.W_O"][head]
        middle = x + attn
        if get("attn_only"):
            x = middle
            continue
        normed = norm(f"{at}.ln2", x if get("parallel_attn_mlp") else middle)
        if get("gated_mlp"):
            hidden = acts[cfg["act_fn"]](normed @ state[f"{at}.mlp.W_gate"]) * (normed @ state[f"{at}.mlp.W_in"])
            hidden = hidden + state[f"{at}.mlp.b_in"]  # after the gate, in this library
        else:
            hidden = acts[cfg["act_fn"]](normed @ state[f"{at}.mlp.W_in"] + state[f"{at}.mlp.b_in"])
        if cfg["act_fn"] == "solu_ln":
            hidden = norm(f"{at}.mlp.ln", hidden, True)
        x = middle + hidden @ state[f"{at}.mlp.W_out"] + state[f"{at}.mlp.b_out"]
    return norm("ln_final", x) @ state["unembed.W_U"] + state["unembed.b_U"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["object", "dict"])
def test_settings_and_weights(variant: str, form: str) -> None:
    cfg = BASE | VARIANTS[variant]
    state = lens_state(cfg)
    if form == "object":
        model = load_model(SimpleNamespace(cfg=SimpleNamespace(**cfg), state_dict=lambda: state, tokenizer="mine"))
        assert model.tokenizer == "mine"
    else:
        model = load_model((state, cfg))
    expected = lens_forward(cfg, state, TOKENS)
    assert expected.std() > 0.5
    assert (model.forward(TOKENS) - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()) / 20)


FOLDABLE = [name for name in VARIANTS if name != "shortformer"]


@pytest.mark.parametrize("variant", FOLDABLE)
@pytest.mark.parametrize("options", ["fold_ln", "center_writing", "center_unembed", "fold_value_biases", "all"])
def test_folding_keeps_log_probabilities(variant: str, options: str) -> None:
    cfg = BASE | VARIANTS[variant]
    pair = (lens_state(cfg), cfg)
    every = ["fold_ln", "center_writing", "center_unembed", "fold_value_biases"]
    names = every if options == "all" else [options]
    is_layer_norm = (cfg["normalization_type"] or "").startswith("LN")
    if not is_layer_norm and "center_writing" in names:
        with pytest.raises(PahqError, match=r"center_writing: .*no LayerNorm"):
            load_model(pair, center_writing=True)
        names.remove("center_writing")
    plain = load_model(pair)
    folded = load_model(
        pair,
        fold_ln="fold_ln" in names,
        center_writing="center_writing" in names,
        center_unembed="center_unembed" in names,
        fold_value_biases="fold_value_biases" in names,
    )
    expected, logits = (model.forward(TOKENS).double().log_softmax(-1) for model in (plain, folded))
    assert (logits - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()) / 20)
    if "fold_ln" in names:
        assert not [name for name in folded.weights if ".ln" in name or name.startswith("ln_final")]
        if is_layer_norm:
            assert folded.blocks[0].attn.W_Q.sum(1).abs().max() < 1e-4
    if "center_writing" in names:
        assert folded.residual(TOKENS).mean(-1).abs().max() < 1e-4
    if "center_unembed" in names:
        assert folded.forward(TOKENS).mean(-1).abs().max() < 1e-3
    if "fold_value_biases" in names:
        assert all(block.attn.b_V is None and block.attn.b_O is not None for block in folded.blocks)


@pytest.mark.parametrize("drop", [set(), {"b_O"}, {"b_V"}])
def test_value_biases_of_groups_go_through_every_head(drop: set[str]) -> None:
    cfg = ModelConfig(2, 6, 2, 10, 4, 7, 12, 12, 8)
    weights = random_weights(cfg, 0, drop)
    original = dict(weights)
    plain, folded = build(cfg, weights), build(*fold_value_biases(cfg, weights))
    torch.testing.assert_close(
        folded.forward(TOKENS[:, :8] % 12), plain.forward(TOKENS[:, :8] % 12), rtol=0, atol=1e-11
    )
    assert weights.keys() == original.keys()
    for before, after in zip(plain.blocks, folded.blocks, strict=True):
        assert after.attn.b_V is None
        expected = torch.zeros(10, dtype=torch.float64) if before.attn.b_O is None else before.attn.b_O.clone()
        for head in range(6):
            if before.attn.b_V is not None:
                expected += before.attn.b_V[head // 3] @ before.attn.W_O[head]
        after_bias = torch.zeros(10).double() if after.attn.b_O is None else after.attn.b_O
        torch.testing.assert_close(after_bias, expected)


@pytest.mark.parametrize("case", ["gpt2", "opt", "qwen2", "neox"])
def test_folding_transformers_models(case: str) -> None:
    model = random_model(case)
    layer_norm = CASES[case][0] != "qwen2"
    folded = load_model(model, fold_ln=True, center_writing=layer_norm, center_unembed=True)
    expected = reference(model).log_softmax(-1)
    assert (folded.forward(TOKENS).log_softmax(-1) - expected).abs().max() < 1e-4
    assert folded.source["fold_ln"]


def test_shortformer_norm_is_not_folded() -> None:
    cfg = BASE | VARIANTS["shortformer"]
    with pytest.raises(PahqError, match="fold_ln: shortformer"):
        load_model((lens_state(cfg), cfg), fold_ln=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"act_fn": "elu"}, "act_fn='elu'.*gelu_new"),
        ({"normalization_type": "BN"}, "normalization_type='BN'.*LNPre"),
        ({"positional_embedding_type": "alibi"}, "positional_embedding_type='alibi'"),
        ({"num_experts": 4}, "num_experts=4"),
        ({"output_logits_soft_cap": 30.0}, "output_logits_soft_cap"),
        ({"use_local_attn": True, "window_size": 3, "attn_types": ["local", "global"]}, "mix of local and global"),
        ({"n_ctx": None}, "'n_ctx' is missing"),
        ({"final_rms": True}, "final_rms"),
        ({"d_mlp": 41}, r"blocks\.0\.mlp\.W_in' has shape \[24, 40\].*\[24, 41\]"),
    ],
)
def test_unsupported_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PahqError, match=message):
        load_model((lens_state(BASE), BASE | settings))


def test_unknown_missing_and_damaged_weights() -> None:
    state = lens_state(BASE)
    with pytest.raises(PahqError, match="'hook_x' is not a weight"):
        load_model((state | {"hook_x": torch.zeros(3)}, BASE))
    with pytest.raises(PahqError, match=r"blocks\.1\.attn\.W_K.*missing"):
        load_model(({name: w for name, w in state.items() if name != "blocks.1.attn.W_K"}, BASE))
    state["blocks.0.attn.b_O"][2] = float("inf")
    with pytest.raises(PahqError, match=r"blocks\.0\.attn\.b_O.*NaN or infinity"):
        load_model((state, BASE))


def test_npz_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").write_text("nothing")
    for name in ("weights.npz", "absent.npz"):
        with pytest.raises(PahqError, match=f"{name}: not a readable"):
            load_npz(tmp_path / name, BASE)


def bridge(case: str) -> tuple[Any, Tensor]:
    """An object with a TransformerBridge's attributes: TransformerLens-style weights around a transformers model."""
    model = random_model(case)
    ours = load_model(model)
    pick = ours.weights.get
    blocks = []
    for layer in range(ours.config.n_layers):
        at = f"blocks.{layer}"
        attn = {x: pick(f"{at}.attn.{x}") for x in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")}
        mlp = {x: pick(f"{at}.mlp.{x}") for x in ("W_in", "W_out", "W_gate", "b_in", "b_out", "b_gate")}
        blocks.append(SimpleNamespace(attn=SimpleNamespace(**attn), mlp=SimpleNamespace(**mlp)))
    ends = {"w": "weight", "b": "bias"}
    norms = {
        f"{name[:-2]}.{ends[name[-1]]}": weight
        for name, weight in ours.weights.items()
        if (".ln" in name or "_norm." in name or name.startswith("ln_final"))
        and not (CASES[case][0] == "gptj" and ".ln2" in name)
    }
    unused = torch.zeros(2, ours.config.d_model)  # OPT's table starts with two rows that are never read
    wrapped = SimpleNamespace(
        cfg=SimpleNamespace(normalization_type="LN"),
        original_model=model,
        state_dict=lambda: norms,
        blocks=blocks,
        W_E=ours.W_E,
        W_pos=None if ours.W_pos is None else torch.cat([unused, ours.W_pos]),
        W_U=ours.W_U,
        b_U=pick("unembed.b_U"),
    )
    return wrapped, reference(model)


@pytest.mark.parametrize("case", ["gpt2", "neox", "gptj", "opt", "llama", "llama-tied-biased", "qwen2", "qwen3"])
def test_bridge(case: str) -> None:
    wrapped, expected = bridge(case)
    model = load_model(wrapped)
    assert (model.forward(TOKENS) - expected).abs().max() < 1e-4
    if case != "gpt2":
        return
    by_layer, _ = bridge("gpt2-by-layer")
    by_layer.blocks = wrapped.blocks  # a bridge keeps the stored queries; the division belongs to the forward pass
    by_layer.state_dict = wrapped.state_dict
    scaled = load_model(by_layer)
    assert torch.allclose(scaled.blocks[1].attn.W_Q, wrapped.blocks[1].attn.W_Q / 2)
