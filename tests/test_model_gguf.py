"""GGUF files: round trips of random models, tokenizers from their metadata, damaged files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from gguf_files import ARCHES, VOCABULARY, write_gguf
from pahq.errors import PahqError
from pahq.model import load_model
from pahq.model.architectures import rope_fields
from pahq.model.gguf_file import fraction_of
from pahq.model.gguf_tokenizer import LLAMA3_SPLIT, build_tokenizer
from test_model_architectures import TOKENS, assert_same, random_model, reference


@pytest.mark.parametrize("case", ARCHES)
def test_gguf_agrees_with_transformers(case: str, tmp_path: Path, own_cache: Path) -> None:
    model = random_model(case)
    write_gguf(tmp_path / "model.gguf", case, model)
    first = load_model(tmp_path / "model.gguf")
    assert_same(first, reference(model))
    again = load_model(tmp_path / "model.gguf")  # from the cache
    assert first.config == again.config
    assert torch.equal(first.forward(TOKENS), again.forward(TOKENS))


def test_scaled_frequencies_of_a_gguf(tmp_path: Path, own_cache: Path) -> None:
    model = random_model("llama-linear")
    settings = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 3.0}
    write_gguf(tmp_path / "model.gguf", "llama", model, settings)
    assert_same(load_model(tmp_path / "model.gguf"), reference(model))
    write_gguf(tmp_path / "yarn.gguf", "llama", model, {"llama.rope.scaling.type": "yarn"})
    with pytest.raises(PahqError, match="rotary scaling 'yarn'"):
        load_model(tmp_path / "yarn.gguf")


def test_rotary_dimensions_survive_the_way_through_a_fraction() -> None:
    for d_head in range(2, 300, 2):
        for rotary in range(2, d_head + 1, 2):
            settings = {"rope_type": "default", "partial_rotary_factor": fraction_of(rotary, d_head)}
            found = rope_fields(SimpleNamespace(head_dim=d_head, rope_parameters=settings))
            assert found["rotary_dim"] == rotary


def test_unsupported_gguf_architecture_is_refused(tmp_path: Path, own_cache: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(PahqError, match=r"GGUF architecture 'mamba'.*supported: GPT-2"):
        load_model(tmp_path / "model.gguf")


@pytest.mark.parametrize("kept", [0, 3, 20, 700, 5000, -1])
def test_truncated_gguf_is_one_clear_line(kept: int, tmp_path: Path, own_cache: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", random_model("llama"))
    whole = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:kept])
    with pytest.raises(PahqError, match=r"cut\.gguf: truncated or not a GGUF file"):
        load_model(tmp_path / "cut.gguf")
    assert not own_cache.exists() or not list(own_cache.iterdir())


def test_damaged_weights_of_a_gguf_are_found(tmp_path: Path, own_cache: Path) -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    write_gguf(tmp_path / "nan.gguf", "llama", model)
    with pytest.raises(PahqError, match=r"blocks\.1\.mlp\.W_in.*NaN"):
        load_model(tmp_path / "nan.gguf")
    model.config.intermediate_size = 40
    write_gguf(tmp_path / "shape.gguf", "llama", model)
    with pytest.raises(PahqError, match=r"shape\.gguf.*ffn_up\.weight' has shape \[48, 32\].*\[40, 32\]"):
        load_model(tmp_path / "shape.gguf")
    with pytest.raises(PahqError, match="no such GGUF file"):
        load_model(tmp_path / "absent.gguf")


def test_metadata_that_describe_no_model(tmp_path: Path, own_cache: Path) -> None:
    model = random_model("llama")
    for field, value in (
        ("num_attention_heads", 5),
        ("head_dim", 7),
        ("num_key_value_heads", 3),
        ("max_position_embeddings", 2**31),
    ):
        before = getattr(model.config, field)
        object.__setattr__(model.config, field, value)
        write_gguf(tmp_path / "model.gguf", "qwen2", model)
        with pytest.raises(PahqError, match=r"model\.gguf: |key/value groups"):
            load_model(tmp_path / "model.gguf")
        object.__setattr__(model.config, field, before)
    write_gguf(tmp_path / "merges.gguf", "llama", model, VOCABULARY | {"tokenizer.ggml.merges": ["a z"]})
    with pytest.raises(PahqError, match="vocabulary is damaged"):
        load_model(tmp_path / "merges.gguf")


# Tokenizers


def test_unknown_splitting_rule_is_refused() -> None:
    with pytest.raises(PahqError, match="splitting rule 'viking'"):
        build_tokenizer(VOCABULARY | {"tokenizer.ggml.pre": "viking"})
    with pytest.raises(PahqError, match="kind 'rwkv'"):
        build_tokenizer(VOCABULARY | {"tokenizer.ggml.model": "rwkv"})
    assert build_tokenizer({}) is None


def test_split_of_llama3_and_beginning_of_text() -> None:
    built = build_tokenizer(
        VOCABULARY
        | {
            "tokenizer.ggml.pre": "llama-bpe",
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.add_bos_token": True,
        }
    )
    assert built is not None
    tokenizer, settings = built
    assert tokenizer.encode("ab12").ids == [0, 3, 6]
    assert settings["bos_token"] == "<end>"
    assert "{1,3}" in LLAMA3_SPLIT


def test_sentencepiece_vocabulary() -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁ab", "▁a"]
    built = build_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -8.0, -7.0, -2.0, -1.0, -3.0],
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.add_bos_token": False,
        }
    )
    assert built is not None
    tokens = built[0].encode("ab a é").tokens
    assert tokens == ["▁ab", "▁a", "▁", "<0xC3>", "<0xA9>"]
    assert built[0].decode(built[0].encode("ab a é").ids) == "ab a é"
