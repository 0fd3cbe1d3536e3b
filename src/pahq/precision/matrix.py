"""A weight matrix in a number format, and its product with rows that are rounded to the same format.

Products accumulate in FP32 and leave the matrix unit rounded to BF16 (BF16, FP8), as exact integers
(INT8), or as they are (FP32, TF32). A device without the arithmetic computes the same numbers through
BF16, which holds every FP8 number and so every product of two exactly enough for FP32 sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pahq.precision.formats import Format, Rounded, dequantise, expand, get_format, quantise

FP8_ALIGNMENT, INT8_ALIGNMENT, INT8_ROWS = 16, 8, 32
"""What CUDA's kernels ask of the inner and outer dimensions, and of the number of rows."""


@dataclass(frozen=True)
class LowMatrix:
    """A matrix [k, o], stored by output: values [o, k] in the format, scale [o] float32 (None if unscaled)."""

    fmt: Format
    values: Tensor
    scale: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def encode(self, x: Tensor, spent: bool = False) -> Rounded:
        """Rows x [n, k] float32 in the matrix's format, a scale for each. spent: x may be overwritten."""
        return quantise(x, self.fmt, spent)

    def multiply(self, x: Tensor, spent: bool = False) -> Tensor:
        """Rows x [..., k] float32 -> low(x) @ low(W), float32 [..., o]. spent: x may be overwritten."""
        return self.product(self.encode(x.reshape(-1, x.shape[-1]), spent)).view(*x.shape[:-1], -1)

    def product(self, x: Rounded) -> Tensor:
        """Encoded rows [n, k] -> float32 [n, o]."""
        if self.fmt.storage == torch.int8:
            whole = _int_product(x.values, self.values)
            out = whole.view(torch.float32).copy_(whole)  # in place, for less traffic with memory
        elif self.fmt.name == "tf32":
            out = _tf32_product(x.values, self.values)
        elif self.fmt.is_exact:
            return x.values @ self.values.T
        elif self.fmt.storage == torch.bfloat16:
            out = _bf16_product(x.values, self.values).float()
        else:
            out = _fp8_product(x.values, self.values).float()
        if x.scale is not None:
            out *= x.scale
        if self.scale is not None:
            out *= self.scale
        return out

    def rows(self, outputs: slice | Tensor) -> Tensor:
        """What the matrix holds for some outputs, as float32 [..., k]."""
        is_byte = self.values.element_size() == 1  # FP8 cannot be indexed everywhere, bytes can
        values = (self.values.view(torch.uint8) if is_byte else self.values)[outputs].view(self.values.dtype)
        return dequantise(Rounded(values, None if self.scale is None else self.scale[outputs][..., None]), self.fmt)

    def part(self, outputs: slice | Tensor) -> LowMatrix:
        """The matrix [k, some] of some outputs."""
        return LowMatrix(self.fmt, self.values[outputs], None if self.scale is None else self.scale[outputs])


def low_matrix(weight: Tensor, fmt: Format | str) -> LowMatrix:
    """weight [k, o] float32 -> the matrix in a format, with a scale for each output."""
    fmt = get_format(fmt) if isinstance(fmt, str) else fmt
    if fmt.is_exact or fmt.name == "tf32":
        return LowMatrix(fmt, weight.T, None)
    rounded = quantise(weight.T.contiguous(), fmt)
    return LowMatrix(fmt, rounded.values.contiguous(), None if rounded.scale is None else rounded.scale.squeeze(-1))


def _int_product(x: Tensor, w: Tensor) -> Tensor:
    """int8 [n, k] times int8 [o, k] -> int32 [n, o], exactly."""
    if x.device.type != "cuda":
        # torch's kernel misreads a matrix of a single row, whose two layouts look alike
        return x.int() * w.T.int() if x.shape[1] == 1 else torch.ops.aten._int_mm(x, w.T)
    n, o = x.shape[0], w.shape[0]
    inner, outer = -x.shape[1] % INT8_ALIGNMENT, -o % INT8_ALIGNMENT
    if inner or n < INT8_ROWS:
        x = F.pad(x, (0, inner, 0, max(0, INT8_ROWS - n)))
    if inner or outer:  # else no copy of the weights for every product
        w = F.pad(w, (0, inner, 0, outer))
    return torch.ops.aten._int_mm(x, w.T)[:n, :o]


def _fp8_product(x: Tensor, w: Tensor) -> Tensor:
    """FP8 [n, k] times FP8 [o, k] -> BF16 [n, o]."""
    aligned = x.shape[1] % FP8_ALIGNMENT == 0 and w.shape[0] % FP8_ALIGNMENT == 0
    e5m2 = x.dtype == torch.float8_e5m2 and w.dtype == torch.float8_e5m2  # no kernel takes two of these
    if x.device.type == "cuda" and aligned and not e5m2 and torch.cuda.get_device_capability(x.device) >= (8, 9):
        one = torch.ones((), device=x.device)
        # w is stored by output, so that its transpose is the column-major matrix which the kernel wants
        return torch.ops.aten._scaled_mm(x, w.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=False)
    return _bf16_product(expand(x), expand(w))


def _bf16_product(x: Tensor, w: Tensor) -> Tensor:
    """BF16 [n, k] times BF16 [o, k] -> BF16 [n, o], summed in FP32 to the end."""
    if x.device.type != "cuda":
        return x @ w.T
    with _matmul_flag("allow_bf16_reduced_precision_reduction", False):
        return x @ w.T


def _tf32_product(x: Tensor, w: Tensor) -> Tensor:
    with _matmul_flag("allow_tf32", True):
        return x @ w.T


@contextlib.contextmanager
def _matmul_flag(name: str, value: bool) -> Iterator[None]:
    """One of torch's switches for CUDA's products, put back afterwards."""
    flags = torch.backends.cuda.matmul
    before = getattr(flags, name)
    setattr(flags, name, value)
    try:
        yield
    finally:
        setattr(flags, name, before)
