"""The model core: one functional transformer, and loaders for the formats models come in.

Names are resolved on first use, so that importing ``pahq.model.config`` alone stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pahq.model.config import ModelConfig
    from pahq.model.load import load_model
    from pahq.model.transformer import Transformer, build

__all__ = ["ModelConfig", "Transformer", "build", "load_model"]

_HOME = {"ModelConfig": "config", "Transformer": "transformer", "build": "transformer", "load_model": "load"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
