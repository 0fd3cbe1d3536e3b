"""Weights as the engine needs them: FP32 masters where the model keeps them, low-precision copies made once.

The masters are the model's own tensors (memory-mapped where they come from a safetensors file, so
that two runs share them); only the copies are new memory on the device that computes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pahq.model.transformer import Transformer
from pahq.precision.formats import round_to
from pahq.precision.matrix import LowMatrix, low_matrix
from pahq.precision.policy import Policy

MATRICES = {"mlp_in": "mlp", "mlp_gate": "mlp", "mlp_out": "mlp"}
"""Names of matrices whose kind in a policy is called otherwise."""


WeightKey = tuple[str, int, int]
"""(name, layer, head or group): name is q, k, v, o, mlp_in, mlp_gate, mlp_out or unembed."""


class Held(NamedTuple):
    """Memory that one component takes in one format. place: ``host`` or ``device``."""

    component: str
    format: str
    place: str
    nbytes: int


class WeightStore:
    """Low-precision copies of a model's matrices under a policy, each made when it is first asked for.

    device: where the copies live, by default with the model.
    """

    def __init__(self, model: Transformer, policy: Policy, device: torch.device | None = None) -> None:
        self.model, self.policy = model, policy
        self.device = model.device if device is None else device
        self._copies: dict[WeightKey, LowMatrix] = {}
        self._embedding: LowMatrix | None = None
        self._positions: Tensor | None = None

    def matrix(self, name: str, layer: int = 0, index: int = 0) -> LowMatrix:
        """q, k, v or o of a head (group), mlp_in, mlp_gate, mlp_out of a layer, or unembed."""
        key = (name, layer, index)
        if key not in self._copies:
            weight = self.master(name, layer, index).to(self.device)
            exact = self.policy.heads and self._is_high(name, layer, index)
            self._copies[key] = low_matrix(weight, "fp32" if exact else self.policy.format(MATRICES.get(name, name)))
        return self._copies[key]

    def _is_high(self, name: str, layer: int, index: int) -> bool:
        """Whether the matrix belongs to a head that the policy holds in FP32 (a group's keys serve several heads)."""
        if name not in ("q", "k", "v", "o"):
            return False
        size = 1 if name in ("q", "o") else self.model.config.group_size
        return any((layer, head) in self.policy.heads for head in range(index * size, (index + 1) * size))

    def master(self, name: str, layer: int = 0, index: int = 0) -> Tensor:
        """The FP32 weight [in, out] itself."""
        if name == "unembed":
            return self.model.W_U
        block = self.model.masters[layer]
        if name.startswith("mlp"):
            assert block.mlp is not None
            found = {"mlp_in": block.mlp.W_in, "mlp_gate": block.mlp.W_gate, "mlp_out": block.mlp.W_out}[name]
            assert found is not None
            return found
        return {"q": block.attn.W_Q, "k": block.attn.W_K, "v": block.attn.W_V, "o": block.attn.W_O}[name][index]

    def embedding(self) -> LowMatrix:
        """W_E [d_vocab, d] by row; the unembedding's matrix where they are tied and have one format."""
        W_E, W_U, fmt = self.model.W_E, self.model.W_U, self.policy.format("embed")
        tied = (W_E.data_ptr(), W_E.shape, W_E.stride()) == (W_U.data_ptr(), W_U.T.shape, W_U.T.stride())
        if tied and fmt == self.policy.format("unembed"):
            return self.matrix("unembed")
        if self._embedding is None:
            self._embedding = low_matrix(W_E.T.to(self.device), fmt)
        return self._embedding

    def positions(self) -> Tensor | None:
        """W_pos, rounded, in the model's own type; None where there are none."""
        W_pos, fmt = self.model.W_pos, self.policy.format("embed")
        if W_pos is not None and not fmt.is_exact and self._positions is None:
            self._positions = round_to(W_pos, fmt)
        return W_pos if self._positions is None else self._positions

    def make_all(self) -> None:
        """Makes every copy of attention and MLPs now, so that no test waits for one."""
        cfg = self.model.config
        for layer in range(cfg.n_layers):
            for name, count in (("q", cfg.n_heads), ("k", cfg.n_kv_heads), ("v", cfg.n_kv_heads), ("o", cfg.n_heads)):
                for index in range(count):
                    self.matrix(name, layer, index)
            if cfg.d_mlp:
                for name in ("mlp_in", "mlp_out", *(("mlp_gate",) if cfg.gated else ())):
                    self.matrix(name, layer)

    def held(self) -> list[Held]:
        """What the copies take, by component and format. (FP32 is no copy, where the master is on the same device.)"""
        sums: dict[tuple[str, str], int] = {}
        if self._positions is not None:
            sums["embed", "fp32"] = self._positions.nbytes
        copies = [(MATRICES.get(key[0], key[0]), one, self.master(*key)) for key, one in self._copies.items()]
        if self._embedding is not None:
            copies.append(("embed", self._embedding, self.model.W_E))
        for component, matrix, master in copies:
            if matrix.values.data_ptr() != master.data_ptr():
                key = (component, matrix.fmt.name)
                sums[key] = sums.get(key, 0) + matrix.nbytes
        return [Held(component, fmt, "device", nbytes) for (component, fmt), nbytes in sorted(sums.items())]

    def masters(self) -> list[Held]:
        """What the FP32 masters take, by component; tensors that share memory count once."""
        sums: dict[tuple[str, str], int] = {}
        seen: set[int] = set()
        for name, weight in self.model.weights.items():
            if weight.untyped_storage().data_ptr() in seen and name == "unembed.W_U":
                continue  # tied to the embedding
            seen.add(weight.untyped_storage().data_ptr())
            key = (component_of(name), "host" if weight.device.type == "cpu" else "device")
            sums[key] = sums.get(key, 0) + weight.nbytes
        dtype = "fp64" if self.model.dtype == torch.float64 else "fp32"
        return [Held(component, dtype, place, nbytes) for (component, place), nbytes in sorted(sums.items())]


def component_of(name: str) -> str:
    """The kind of component, in a policy's words, that a weight such as ``blocks.0.attn.W_Q`` belongs to."""
    last = name.rpartition(".")[2]
    if ".attn.W_" in name:
        return last[-1].lower()
    if ".mlp.W_" in name:
        return "mlp"
    return {"embed.W_E": "embed", "pos_embed.W_pos": "embed", "unembed.W_U": "unembed"}.get(name, "norm")
