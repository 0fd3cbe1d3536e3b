"""GGUF files: metadata and tensors translated to ``transformers`` terms, then read like any other checkpoint."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.model.architectures import convert, refuse
from pahq.model.config import ModelConfig
from pahq.model.sources import StateDict

# GGUF architecture -> (transformers model type, name of its tensor table in the gguf package).
FAMILIES = {
    "gpt2": ("gpt2", "GPT2"),
    "gptneox": ("gpt_neox", "GPTNEOX"),
    "gptj": ("gptj", "GPTJ"),
    "llama": ("llama", "LLAMA"),  # Mistral too
    "qwen2": ("qwen2", "QWEN2"),
    "qwen3": ("qwen3", "QWEN3"),
}

# transformers configuration field -> GGUF metadata key, after the architecture's name.
CONFIG_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
OPTIONAL_KEYS = {
    "intermediate_size": "feed_forward_length",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "use_parallel_residual": "use_parallel_residual",
    "rotary_dim": "rope.dimension_count",
}


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata by key, and ``gguf`` tensor records by name; raises PahqError for a file that is not whole."""
    from gguf import GGUFReader

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's remarks about garbage lengths: the error below says it
            reader = GGUFReader(path)
            metadata = {key: field.contents() for key, field in reader.fields.items()}
            tensors = {tensor.name: tensor for tensor in reader.tensors}
            if len(tensors) != int(metadata["GGUF.tensor_count"]):
                raise ValueError("tensors are missing")
    except OSError as error:
        raise PahqError(f"GGUF file {path}: cannot be read ({error.strerror or error}); check the path") from None
    except Exception as error:  # the reader checks little itself: a damaged file fails in any of many ways
        raise PahqError(
            f"GGUF file {path}: truncated or not a GGUF file ({str(error)[:80]}); download it again"
        ) from None
    return metadata, tensors


class Dequantised(Mapping[str, Tensor]):
    """The file's tensors as float32, each unpacked when it is asked for."""

    def __init__(self, tensors: dict[str, Any], fix: Callable[[str, Tensor], Tensor], path: Path) -> None:
        self.tensors = tensors
        self.fix = fix
        self.path = path

    def __getitem__(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        record = self.tensors[name]
        try:
            values = dequantize(record.data, record.tensor_type)
        except NotImplementedError:
            raise PahqError(
                f"GGUF file {self.path}: the tensor '{name}' has the type {record.tensor_type.name}, "
                "which cannot be unpacked; give a Q4, Q5, Q6, Q8, F16 or F32 file"
            ) from None
        return self.fix(name, torch.from_numpy(np.array(values, dtype=np.float32)))

    def __contains__(self, name: object) -> bool:  # the mixin's would unpack the tensor to find out
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any]]:
    """Configuration, weights (float32, see ``architectures.convert``) and metadata of a GGUF file."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    metadata, tensors = open_gguf(path)
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise refuse(f"the GGUF architecture '{family}'", f"known are {', '.join(FAMILIES)}")
    model_type, table = FAMILIES[family]
    try:
        hf = hf_config(path, metadata, tensors, family, model_type)
    except PahqError:
        raise
    except Exception as error:  # transformers validates with many exception types
        reason = str(error).strip().splitlines()[-1:]
        raise PahqError(
            f"GGUF file {path}: its metadata describe no valid model ({' '.join(reason)}); download it again"
        ) from None
    names = get_tensor_name_map(MODEL_ARCH[table], hf.num_hidden_layers)

    def rename(name: str) -> str:
        return names.get_name(name, try_suffixes=(".weight", ".bias")) or name

    factors = tensors.pop("rope_freqs.weight", None)  # Llama 3's scaling, worked out by the writer
    tensors = {name: record for name, record in tensors.items() if not name.endswith(".attn_rot_embd.weight")}
    fix = layout_fix(family, hf.num_attention_heads, getattr(hf, "num_key_value_heads", hf.num_attention_heads))
    source = StateDict(Dequantised(tensors, fix, path), rename=rename, place=f"GGUF file {path}")
    cfg, weights = convert(hf, source)
    if factors is not None and "rotary.inv_freq" in weights:
        weights["rotary.inv_freq"] = weights["rotary.inv_freq"] / torch.from_numpy(np.array(factors.data).copy())
    return cfg, weights, metadata


def hf_config(path: Path, metadata: dict[str, Any], tensors: dict[str, Any], family: str, model_type: str) -> Any:
    """The ``transformers`` configuration that the metadata describes."""
    from transformers import AutoConfig

    fields: dict[str, Any] = {}
    for field, key in (CONFIG_KEYS | OPTIONAL_KEYS).items():
        value = metadata.get(f"{family}.{key}")
        if value is None and field in CONFIG_KEYS:
            raise PahqError(f"GGUF file {path}: the metadata key '{family}.{key}' is missing; download it again")
        if isinstance(value, list):
            if len(set(value)) > 1:
                raise refuse(f"a GGUF model whose {key} differs between layers", "all layers must be alike")
            value = value[0]
        if value is not None:
            fields[field] = value
    n_ctx = fields["max_position_embeddings"]
    if n_ctx > 2**24:  # tables of positions would fill the memory
        raise PahqError(f"GGUF file {path}: a context of {n_ctx} tokens is not credible; download it again")
    d_head = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    fields["head_dim"] = d_head
    if model_type in ("gpt2", "gptj"):
        fields["n_inner"] = fields.pop("intermediate_size", None)
    rotary = fields.get("rotary_dim", d_head)
    if model_type != "gptj":
        fields.pop("rotary_dim", None)
    if model_type not in ("gpt2", "gptj"):
        fields["rope_parameters"] = rope_parameters(metadata, family, fraction_of(rotary, d_head))
    if family == "llama" and f"{family}.attention.sliding_window" in metadata:
        model_type = "mistral"
        fields["sliding_window"] = metadata[f"{family}.attention.sliding_window"]
    if "token_embd.weight" not in tensors:
        raise PahqError(f"GGUF file {path}: the tensor 'token_embd.weight' is missing; download it again")
    return AutoConfig.for_model(
        model_type,
        **fields,
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        name_or_path=str(metadata.get("general.name", path.stem)),
    )


def fraction_of(rotary: int, d_head: int) -> float:
    """rotary / d_head, rounded up: transformers multiplies it by d_head and drops what lies behind the point."""
    return math.nextafter(rotary / d_head, math.inf) if rotary < d_head else rotary / d_head


def rope_parameters(metadata: dict[str, Any], family: str, fraction: float) -> dict[str, Any]:
    """Rotary settings in transformers' terms."""
    settings: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(metadata.get(f"{family}.rope.freq_base", 10000.0)),
        "partial_rotary_factor": fraction,
    }
    kind = metadata.get(f"{family}.rope.scaling.type", "none")
    if kind == "linear":
        settings |= {"rope_type": "linear", "factor": float(metadata[f"{family}.rope.scaling.factor"])}
    elif kind != "none":
        raise refuse(f"the GGUF rotary scaling '{kind}'", "known are none and linear")
    return settings


def layout_fix(family: str, heads: int, groups: int) -> Callable[[str, Tensor], Tensor]:
    """What undoes the writer's rearrangement of a tensor."""

    def llama(name: str, weight: Tensor) -> Tensor:
        """Rows of q and k come paired (0, 1), (2, 3), …; transformers pairs i with i + half."""
        for part, count in ((".attn_q.", heads), (".attn_k.", groups)):
            if part in name and len(weight) % (2 * count) == 0:  # else the shape is wrong, and is reported later
                return weight.view(count, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
        return weight

    def gptneox(name: str, weight: Tensor) -> Tensor:
        """q, k and v come in thirds; transformers keeps them together head by head."""
        if ".attn_qkv." in name and len(weight) % (3 * heads) == 0:
            return weight.view(3, heads, -1, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)
        return weight

    def gpt2(name: str, weight: Tensor) -> Tensor:
        """Linear maps are stored [out, in]; GPT-2 in transformers has them [in, out]."""
        return weight.T if name.startswith("blk.") and weight.dim() == 2 else weight

    return {"llama": llama, "gptneox": gptneox, "gpt2": gpt2}.get(family, lambda name, weight: weight)
