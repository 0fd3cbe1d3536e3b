"""Writes random models as GGUF files, in the arrangement the usual converters use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

ARCHES = {
    "gpt2": ("gpt2", "GPT2"),
    "neox": ("gptneox", "GPTNEOX"),
    "neox-serial": ("gptneox", "GPTNEOX"),
    "gptj": ("gptj", "GPTJ"),
    "llama": ("llama", "LLAMA"),
    "llama-head-dim": ("llama", "LLAMA"),
    "llama-tied-biased": ("llama", "LLAMA"),
    "mistral-window": ("llama", "LLAMA"),
    "qwen2": ("qwen2", "QWEN2"),
    "qwen3": ("qwen3", "QWEN3"),
}


VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<end>", "a", "b", "ab", "1", "2", "12", *(chr(0x4E00 + i) for i in range(54))],
    "tokenizer.ggml.token_type": [3] + [1] * 60,
    "tokenizer.ggml.merges": ["a b", "1 2"],
    "tokenizer.ggml.eos_token_id": 0,
}


def as_written(arch: str, name: str, weight: Tensor, config: Any) -> Tensor:
    """How the usual converter rearranges a tensor before it writes it."""
    heads = config.num_attention_heads
    if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
        count = heads if ".q_proj." in name else config.num_key_value_heads
        rows = weight.reshape(count, 2, -1, *weight.shape[1:])
        return rows.swapaxes(1, 2).reshape(weight.shape)
    if arch == "gptneox" and "query_key_value" in name:
        by_head = weight.reshape(heads, 3, -1, *weight.shape[1:])
        return torch.cat([by_head[:, i].reshape(-1, *weight.shape[1:]) for i in range(3)])
    if arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return weight.T
    return weight


def write_gguf(path: Path, case: str, model: Any, metadata: dict[str, Any] | None = None) -> None:
    arch, table = ARCHES[case]
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if hasattr(config, "num_key_value_heads"):
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    if getattr(config, "rope_parameters", None):
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch == "gptneox":
        width = config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(width * config.rope_parameters["partial_rotary_factor"]))
        writer.add_parallel_residual(config.use_parallel_residual)
    if arch == "gptj":
        writer.add_rope_dimension_count(config.rotary_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, list: writer.add_array, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, table), config.num_hidden_layers)
    state = model.state_dict()
    for name, weight in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert written is not None, name
        writer.add_tensor(written, np.ascontiguousarray(as_written(arch, name, weight, config).numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
