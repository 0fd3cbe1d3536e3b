"""Everything that can be wrong with a model's name, folder or files: one clear line each."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from gguf_files import VOCABULARY
from pahq.errors import PahqError
from pahq.model import load_model
from pahq.model.gguf_tokenizer import build_tokenizer
from test_model_architectures import TOKENS, random_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_unknown_name() -> None:
    for name in ("smollm2-136m", "no such model"):
        with pytest.raises(PahqError, match=rf"model '{name}': is not known; .*smollm2-135m.*folder.*\.gguf.*hub id"):
            load_model(name)
    with pytest.raises(PahqError, match="of type int"):
        load_model(3)
    with pytest.raises(PahqError, match="a pair must be"):
        load_model(({"a": 1}, {}))


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_absent_device(device: str) -> None:
    with pytest.raises(PahqError, match=f"device '{device}': cannot be used here"):
        load_model(random_model("gpt2"), device=device)


def test_offline_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> str:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(PahqError, match=r"model 'owner/name': not in the local cache.*ConnectionError.*local folder"):
        load_model("owner/name")


def test_hub_model_that_is_in_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def found(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    assert load_model("owner/name").config.name == "owner/name"
    assert not [pattern for pattern in asked["owner/name"] if "bin" in pattern or pattern == "*"]


def test_incomplete_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PahqError, match=r"is a file, but no \.gguf file"):
        load_model(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(PahqError, match=r"there is no model\.safetensors"):
        load_model(folder)
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({}, file)
    with pytest.raises(PahqError, match=r"pickled weights.*convert them to safetensors"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(PahqError, match=r"config\.json cannot be read"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(PahqError, match=r"there is no config\.json"):
        load_model(folder)


@pytest.mark.parametrize("kept", [0, 5, 500, -1])
def test_truncated_safetensors(kept: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(PahqError, match=r"model\.safetensors: truncated or damaged"):
        load_model(folder)


def test_shards(folder: Path, tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(PahqError, match=f"{shards[1].name}: missing"):
        load_model(tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(PahqError, match="not a valid index"):
        load_model(tmp_path / "shards")


def test_wrong_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    good = load_file(file)
    name = "model.layers.1.self_attn.k_proj.weight"

    def expect(weights: dict[str, torch.Tensor], message: str) -> None:
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(PahqError, match=message):
            load_model(folder)

    expect(good | {name: torch.zeros(5, 32)}, r"k_proj\.weight' has shape \[5, 32\].*\[16, 32\]")
    expect({key: w for key, w in good.items() if key != name}, r"k_proj\.weight' \[16, 32\] is missing")
    expect(good | {name: torch.full((16, 32), torch.nan)}, r"blocks\.1\.attn\.W_K.*NaN or infinity")
    expect(good | {name: torch.zeros(16, 32, dtype=torch.int8)}, "int8; give the unquantised model")
    expect(good | {"model.layers.1.lora_A.weight": torch.zeros(2)}, r"lora_A\.weight.*no place.*adapters merged")


def test_wrong_configurations(folder: Path) -> None:
    change(folder, model_type="bloom")
    with pytest.raises(PahqError, match=r"architecture 'bloom' is not supported; supported: GPT-2.*Qwen3"):
        load_model(folder)
    change(folder, model_type="llama", num_attention_heads=5)
    with pytest.raises(PahqError, match=r"config\.json is not valid"):
        load_model(folder)
    change(folder, num_attention_heads=4, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(PahqError, match="quantised"):
        load_model(folder)


def test_tokenizer_of_a_folder(folder: Path) -> None:
    built = build_tokenizer(VOCABULARY)
    assert built is not None
    built[0].save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    model = load_model(folder)
    assert model.tokenizer("ab12")["input_ids"] == [3, 4, 5]
    assert model.forward(TOKENS).shape == (3, 14, 61)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(PahqError, match=r"tokenizer in .*cannot be read"):
        load_model(folder)


def test_light_import() -> None:
    code = "import sys, pahq.model.config; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
