"""Where weights come from: tensors looked up by their ``transformers`` name, each taken once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from pahq.errors import PahqError


class Source(Protocol):
    """Named tensors. Names are those of the architecture's causal language model in ``transformers``."""

    def has(self, name: str) -> bool: ...

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor ``name``; raises PahqError if it is missing, of another shape or not floating point."""
        ...

    def left(self) -> list[str]:
        """Names nobody took."""
        ...


class StateDict:
    """A mapping of tensors, such as ``model.state_dict()`` or an opened safetensors file.

    prefix: what the causal model puts before its body's names; files saved from the bare body lack it.
    rename: from a ``transformers`` name to the name in the mapping, where they differ.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        prefix: str = "",
        rename: Callable[[str], str] = lambda name: name,
        place: str = "weights",
    ) -> None:
        self.tensors = tensors
        self.prefix = prefix
        self.rename = rename
        self.place = place
        self.taken: set[str] = set()

    def _find(self, name: str) -> str | None:
        candidate = self.rename(name)
        if candidate in self.tensors:
            return candidate
        for part in self.prefix.split(".")[:-1]:  # "model.decoder.x" may be stored as "decoder.x" or as "x"
            name = name.removeprefix(f"{part}.")
            if name in self.tensors:
                return name
        return None

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = self._find(name)
        if found is None:
            raise PahqError(
                f"{self.place}: the weight '{self.rename(name)}' {list(shape)} is missing; the model is incomplete"
            )
        self.taken.add(found)
        return checked(self.tensors[found], found, shape, self.place)

    def left(self) -> list[str]:
        return [name for name in self.tensors if name not in self.taken]


def checked(weight: Tensor, name: str, shape: tuple[int, ...], place: str) -> Tensor:
    """``weight`` itself; raises PahqError if it has another shape or is not floating point."""
    if tuple(weight.shape) != shape:
        raise PahqError(
            f"{place}: the weight '{name}' has shape {list(weight.shape)}, but the model's configuration "
            f"asks for {list(shape)}; weights and configuration must come from the same model"
        )
    if not weight.is_floating_point():
        raise PahqError(f"{place}: the weight '{name}' is {weight.dtype}; give the unquantised model")
    return weight.detach()
