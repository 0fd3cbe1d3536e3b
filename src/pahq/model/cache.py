"""Converted models on disk: unpacked once, then mapped into memory at every later start.

One folder a model: ``model.safetensors`` in our own layout, ``config.json`` (ModelConfig, checksums) and
``tokenizer.json``. A folder appears whole or not at all, and is rebuilt if anything in it is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pahq.errors import PahqError
from pahq.model.config import ModelConfig

FORMAT = 1  # raise when the converted layout changes: older folders are then no longer found

# What ``convert`` gives: configuration, weights, and (tokenizer, its special-token settings) or None.
Converted = tuple[ModelConfig, dict[str, Tensor], tuple[Any, dict[str, Any]] | None]


def cache_root() -> Path:
    """$PAHQ_CACHE, or the platform's cache folder for this program."""
    if given := os.environ.get("PAHQ_CACHE"):
        return Path(given).expanduser()
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "pahq" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pahq"


def identity(path: Path) -> str:
    """A key for a file's content: size, time of change and 64 blocks spread over it. Cheap for any size."""
    stat = path.stat()
    digest = hashlib.blake2b(f"{FORMAT}:{stat.st_size}:{stat.st_mtime_ns}".encode(), digest_size=12)
    with path.open("rb") as file:
        for block in range(64):
            file.seek(block * max(stat.st_size - 65536, 0) // 63)
            digest.update(file.read(65536))
    return digest.hexdigest()


def cached(path: Path, convert: Callable[[], Converted]) -> tuple[ModelConfig, dict[str, Tensor], Any]:
    """The conversion of the model file ``path``: from the cache, or by ``convert`` and then into the cache.

    Returns configuration, weights (memory-mapped) and a ``transformers`` tokenizer or None.
    Raises PahqError where the cache cannot be written.
    """
    root = cache_root()
    folder = root / f"{path.stem}-{identity(path)}"
    found = read(folder)
    if found is not None:
        return found
    converted = convert()
    try:
        root.mkdir(parents=True, exist_ok=True)
        store(folder, converted)
    except OSError as error:
        raise PahqError(
            f"cache folder {root}: cannot be written ({error.strerror or error}); "
            "make room or name another folder in PAHQ_CACHE"
        ) from None
    found = read(folder)
    if found is None:
        raise PahqError(f"cache folder {folder}: damaged as it was written; check the disk or set PAHQ_CACHE")
    return found


def checksum(weights: Mapping[str, Tensor]) -> int:
    """Sum of all 64-bit words (and odd bytes): exact, independent of order and threads, as fast as memory."""
    total = 0
    for weight in weights.values():
        octets = weight.contiguous().numpy().reshape(-1).view(np.uint8)
        whole = octets.size // 8 * 8
        total += int(octets[:whole].view(np.int64).sum()) + int(octets[whole:].sum())
    return total


def store(folder: Path, converted: Converted) -> None:
    """Writes a conversion beside ``folder`` and moves it into place; several processes may do so at once."""
    from safetensors.torch import save_file

    cfg, weights, tokenizer = converted
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        weights = {name: weight.float().contiguous() for name, weight in weights.items()}
        try:
            save_file(weights, temporary / "model.safetensors")
        except Exception as error:  # safetensors reports a full disk by its own type
            raise OSError(str(error)) from None
        meta: dict[str, Any] = {"format": FORMAT, "config": cfg.to_dict(), "checksum": checksum(weights)}
        if tokenizer is not None:
            text = tokenizer[0].to_str()
            (temporary / "tokenizer.json").write_text(text, encoding="utf-8")
            meta |= {"tokenizer": tokenizer[1], "tokenizer_checksum": hashlib.blake2b(text.encode()).hexdigest()}
        (temporary / "config.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Renames ``temporary`` to ``folder``; a damaged folder there is moved away first, a sound one is kept."""
    for _ in range(8):
        try:
            os.rename(temporary, folder)
            return
        except OSError:
            if not folder.is_dir():
                raise
            if read(folder) is not None:
                return  # another process was faster
            away = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)) / "damaged"
            try:
                os.rename(folder, away)
            except FileNotFoundError:
                pass  # another process moved it
            finally:
                shutil.rmtree(away.parent, ignore_errors=True)
    raise OSError(f"{folder} is busy")


def read(folder: Path) -> tuple[ModelConfig, dict[str, Tensor], Any] | None:
    """A sound cache folder's content, or None where it is absent or damaged."""
    from safetensors.torch import load_file

    try:
        meta = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
        tokenizer = None
        if "tokenizer" in meta:
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            if hashlib.blake2b(text.encode()).hexdigest() != meta["tokenizer_checksum"]:
                return None
            tokenizer = wrap_tokenizer(folder / "tokenizer.json", meta["tokenizer"])
        if meta["format"] != FORMAT or checksum(weights) != meta["checksum"]:
            return None
        return ModelConfig(**meta["config"]), weights, tokenizer
    except Exception:  # whatever is wrong with it, the cure is the same: convert again
        return None


def wrap_tokenizer(file: Path, settings: dict[str, Any]) -> Any:
    """A ``transformers`` tokenizer around a tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(file), clean_up_tokenization_spaces=False, **settings)
