"""The cache of converted models: damage, change, several processes, no place to write."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from gguf_files import VOCABULARY, write_gguf
from pahq.errors import PahqError
from pahq.model import cache, load_model
from test_model_architectures import TOKENS, assert_same, random_model, reference

# The cache


def damage(folder: Path, how: str) -> None:
    file = folder / ("tokenizer.json" if how == "tokenizer" else "model.safetensors")
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flipped bit":
        content[-100] ^= 1
        file.write_bytes(content)
    elif how == "tokenizer":
        file.write_bytes(content.replace(b"ab", b"ba"))
    elif how == "missing":
        file.unlink()
    else:
        (folder / "config.json").write_text(how)


@pytest.mark.parametrize("how", ["truncated", "flipped bit", "tokenizer", "missing", "{", "{}"])
def test_damaged_cache_is_rebuilt(how: str, tmp_path: Path, own_cache: Path) -> None:
    model = random_model("llama")
    write_gguf(tmp_path / "model.gguf", "llama", model, VOCABULARY)
    load_model(tmp_path / "model.gguf")
    (folder,) = own_cache.iterdir()
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    damage(folder, how)
    assert cache.read(folder) is None
    again = load_model(tmp_path / "model.gguf")
    assert_same(again, reference(model))
    assert again.tokenizer("ab12")["input_ids"] == [3, 4, 5]  # digits are kept apart, whatever the merges say
    assert list(own_cache.iterdir()) == [folder]
    assert cache.read(folder) is not None


def test_changed_file_is_converted_again(tmp_path: Path, own_cache: Path) -> None:
    for case in ("llama", "llama-head-dim"):
        model = random_model(case)
        write_gguf(tmp_path / "model.gguf", "llama", model)
        assert_same(load_model(tmp_path / "model.gguf"), reference(model))


def load_in_process(file: Path, results: Any) -> None:
    results.put(load_model(file).forward(TOKENS).sum().item())


def test_two_processes_convert_at_once(tmp_path: Path, own_cache: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", random_model("llama"))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=load_in_process, args=(tmp_path / "model.gguf", results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    values = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert values[0] == values[1]
    assert len(list(own_cache.iterdir())) == 1, "a temporary folder was left behind"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_cache_by_permission(tmp_path: Path, own_cache: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", random_model("llama"))
    own_cache.mkdir(mode=0o500)
    with pytest.raises(PahqError, match="cannot be written"):
        load_model(tmp_path / "model.gguf")


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", random_model("llama"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("PAHQ_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(PahqError, match=r"cache folder .* cannot be written .*PAHQ_CACHE"):
        load_model(tmp_path / "model.gguf")


def test_cache_record_holds_the_configuration(tmp_path: Path, own_cache: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "qwen2", random_model("qwen2"))
    ours = load_model(tmp_path / "model.gguf")
    (folder,) = own_cache.iterdir()
    recorded = json.loads((folder / "config.json").read_text())["config"]
    assert recorded | {"name": "model"} == ours.config.to_dict()
    tied = [name for name in ours.weights if name == "unembed.W_U"]
    assert tied
    assert (folder / "model.safetensors").stat().st_size < 1.2 * 4 * sum(
        w.numel() for n, w in ours.weights.items() if n not in tied
    )
