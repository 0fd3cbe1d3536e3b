"""Models in ``transformers``' format: a local folder, a hub id, or a live model object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pahq.errors import PahqError
from pahq.model.architectures import convert, lookup
from pahq.model.config import ModelConfig
from pahq.model.sources import StateDict

PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "special_tokens_map.json")
VOCABULARIES = ("vocab.json", "merges.txt", "added_tokens.json", "*.model")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor], Any]:
    """Configuration, weights (views of memory-mapped files) and tokenizer (or None) of a local folder.

    Only safetensors are read: other weight files can run code when they are opened.
    """
    hf = read_config(folder)
    arch = lookup(hf.model_type)  # before gigabytes are opened
    tensors = read_tensors(folder)
    cfg, weights = convert(hf, StateDict(tensors, arch.prefix, place=f"model folder {folder}"))
    return cfg, weights, read_tokenizer(folder)


def read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise PahqError(f"model folder {folder}: there is no config.json in it; give a transformers folder") from None
    except (OSError, ValueError, AttributeError) as error:
        raise PahqError(f"model folder {folder}: config.json cannot be read ({error}); download it again") from None
    lookup(kind)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers validates with many exception types
        raise PahqError(f"model folder {folder}: config.json is not valid ({error}); download it again") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors or of the shards its index names."""
    from safetensors.torch import load_file

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        try:
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise PahqError(f"{index}: not a valid index ({error}); download it again") from None
    elif list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        raise PahqError(
            f"model folder {folder}: it holds only pickled weights (.bin), which can run code when opened; "
            "convert them to safetensors"
        )
    else:
        raise PahqError(f"model folder {folder}: there is no model.safetensors in it; download the weights")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except FileNotFoundError:
            raise PahqError(f"weights file {file}: missing, though the index names it; download it again") from None
        except Exception as error:  # safetensors has its own exception, torch's mmap another
            raise PahqError(f"weights file {file}: truncated or damaged ({error}); download it again") from None
    return tensors


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None where it holds none."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged tokenizer file provokes
        raise PahqError(f"tokenizer in {folder}: cannot be read ({str(error)[:120]}); download it again") from None


def download(name: str) -> Path:
    """The local copy of a hub model, downloaded if need be; raises PahqError if it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[*PATTERNS, *VOCABULARIES]))
    except HFValidationError:
        raise PahqError(
            f"model '{name}': there is no such folder, and a hub id has the form 'owner/name'; check the path"
        ) from None
    except RepositoryNotFoundError:
        raise PahqError(f"model '{name}': the hub has no such model, or it needs a login; check the name") from None
    except Exception as error:  # every network layer has its own exceptions
        raise PahqError(
            f"model '{name}': not in the local cache, and the hub cannot be reached "
            f"({type(error).__name__}); go online once, or give a local folder"
        ) from None


def read_pair(state: Mapping[str, Tensor], hf: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A state dict in ``transformers``' names and the configuration that belongs to it (object or dict)."""
    if isinstance(hf, Mapping):
        from transformers import AutoConfig

        lookup(hf.get("model_type"))
        try:
            hf = AutoConfig.for_model(**hf)
        except Exception as error:  # transformers validates with many exception types
            raise PahqError(f"model configuration: not valid ({error}); correct it") from None
    return convert(hf, StateDict(state, lookup(getattr(hf, "model_type", None)).prefix))
