"""Logits of every supported architecture against transformers, as an object, a folder and a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pahq.errors import PahqError
from pahq.model import Transformer, load_model

TOKENS = torch.randint(0, 61, (3, 14), generator=torch.Generator().manual_seed(1))
IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "vocab_size": 61}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 20, **IDS}
NEOX: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
    **IDS,
}
LLAMA = {**NEOX, "num_key_value_heads": 2}
ROPE3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 8}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT),
    "gpt2-untied": ("gpt2", {**GPT, "tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu"}),
    "gpt2-by-layer": ("gpt2", {**GPT, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2-unscaled": ("gpt2", {**GPT, "scale_attn_weights": False}),
    "neox": ("gpt_neox", {**NEOX, "rotary_pct": 0.5}),
    "neox-serial": ("gpt_neox", {**NEOX, "rotary_pct": 1.0, "use_parallel_residual": False}),
    "neox-bare": ("gpt_neox", {**NEOX, "attention_bias": False, "tie_word_embeddings": True}),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}),
    "opt": ("opt", {**{k: v for k, v in NEOX.items() if k != "intermediate_size"}, "ffn_dim": 48}),
    "opt-bare": ("opt", {**NEOX, "ffn_dim": 48, "enable_bias": False, "layer_norm_elementwise_affine": False}),
    "llama": ("llama", LLAMA),
    "llama-tied-biased": ("llama", {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {**LLAMA, "head_dim": 12}),
    "llama-gelu": ("llama", {**LLAMA, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-llama3": ("llama", {**LLAMA, "rope_parameters": ROPE3}),
    "llama-linear": ("llama", {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 3.0}}),
    "llama-yarn": ("llama", {**LLAMA, "rope_parameters": YARN}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": None}),
    "mistral-window": ("mistral", {**LLAMA, "sliding_window": 5}),
    "qwen2": ("qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 12}),
}


def random_model(case: str) -> Any:
    """A transformers model whose every weight matters: wide random matrices, no zero bias, no unit norm."""
    kind, settings = CASES[case]
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = weight.dim() == 1 and not name.endswith("bias")
            weight.copy_(1 + 0.3 * noise if is_norm else noise * (0.3 if weight.dim() == 1 else 0.25))
    return model


@torch.no_grad()
def reference(model: Any) -> Tensor:
    return model(TOKENS).logits


def assert_same(ours: Transformer, expected: Tensor) -> None:
    logits = ours.forward(TOKENS)
    assert expected.std() > 0.5, "the random model says too little to be a test"
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_object_agrees_with_transformers(case: str) -> None:
    model = random_model(case)
    ours = load_model(model)
    assert_same(ours, reference(model))
    with torch.no_grad():
        next(iter(model.parameters())).zero_()
    assert ours.W_E.abs().max() > 0, "the loaded model shares memory with the caller's"


@pytest.mark.parametrize("case", ["gpt2", "neox", "gptj", "opt", "llama-tied-biased", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_folder_agrees_with_transformers(case: str, shard: str, tmp_path: Path) -> None:
    model = random_model(case)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    ours = load_model(str(tmp_path))
    assert ours.tokenizer is None
    assert_same(ours, reference(model))


@pytest.mark.parametrize("case", ["gpt2", "neox", "opt", "llama"])
def test_bare_body_of_a_model_needs_its_unembedding(case: str, tmp_path: Path) -> None:
    model = random_model(case)
    model.base_model.save_pretrained(tmp_path)
    if CASES[case][0] in ("gpt2", "opt"):  # tied: the body is all there is
        assert_same(load_model(tmp_path), reference(model))
    else:
        with pytest.raises(PahqError, match=r"lm_head\.weight.*missing"):
            load_model(tmp_path)


def test_pair_of_state_dict_and_configuration() -> None:
    model = random_model("llama")
    assert_same(load_model((model.state_dict(), model.config)), reference(model))
    assert_same(load_model((model.state_dict(), model.config.to_dict())), reference(model))


def test_unembedding_is_tied_without_a_copy() -> None:
    ours = load_model(random_model("qwen2"))
    assert ours.W_U.data_ptr() == ours.W_E.data_ptr()


def test_low_precision_keeps_exact_frequencies() -> None:
    model = random_model("llama")
    ours = load_model(model, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert ours.rotary is not None
    full = load_model(model).rotary
    assert full is not None
    assert torch.equal(ours.rotary.cos, full.cos)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "architecture": (
        "bloom",
        {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 11},
        "'bloom'.*GPT-2.*Qwen3",
    ),
    "activation": ("gpt2", {**GPT, "activation_function": "tanh"}, "activation 'tanh'"),
    "cross-attention": ("gpt2", {**GPT, "add_cross_attention": True}, "cross-attention"),
    "post-norm": ("opt", {**NEOX, "ffn_dim": 48, "do_layer_norm_before": False}, "OPT-350m"),
    "projected": ("opt", {**NEOX, "ffn_dim": 48, "word_embed_proj_dim": 16}, "projected embeddings"),
    "mixed windows": (
        "qwen2",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "several kinds",
    ),
    "rope": (
        "llama",
        {**LLAMA, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rotary scaling 'dynamic'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_models_are_refused_by_name(case: str) -> None:
    kind, settings, message = REFUSED[case]
    config = transformers.AutoConfig.for_model(kind, **settings)
    with pytest.raises(PahqError, match=message) as error:
        load_model(transformers.AutoModelForCausalLM.from_config(config))
    assert "supported: GPT-2, GPT-NeoX/Pythia" in str(error.value)
