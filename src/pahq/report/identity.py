"""Fingerprints of what a run computes on, so that a resumed run notices other weights or prompts."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from pahq.model.transformer import Transformer
from pahq.task.prompts import Prompts


def of_model(model: Transformer) -> str:
    """SHA-256 over the architecture (not its name) and every weight: name, type, shape, values."""
    architecture = {key: value for key, value in model.config.to_dict().items() if key != "name"}
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name in sorted(model.weights):
        _add(digest, name, model.weights[name])
    return digest.hexdigest()


def of_prompts(prompts: Prompts) -> str:
    """SHA-256 over the tokens, the positions read and the answers."""
    digest = hashlib.sha256()
    for name in ("clean", "corrupt", "read", "read_mask", "answers", "wrong", "pad"):
        value = getattr(prompts, name)
        if value is not None:
            _add(digest, name, value)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, value: Tensor) -> None:
    digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
    plain = value.detach().cpu().contiguous()
    if plain.numel():
        digest.update(plain.view(-1).view(torch.uint8).numpy().data)
