"""Rounding that gradients pass straight through, and products whose gradients are rounded in turn.

Rounding has no useful derivative; the straight-through estimator (Bengio et al. 2013) takes it for the identity. A
product x @ W of low precision sends back low(gradient) @ low(W)^T: gradients are small as differences are, and get
scales of their own, row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pahq.precision.formats import Format, Rounded, round_to
from pahq.precision.matrix import LowMatrix

Map = Callable[[Tensor], Tensor]


class _Through(Function):
    """One function forward, another one for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ahead: Map, back: Map | None) -> Tensor:
        ctx.back = back
        return ahead(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grad_outputs
        return grad if ctx.back is None else ctx.back(grad), None, None


def through(x: Tensor, ahead: Map, back: Map | None = None) -> Tensor:
    """``ahead(x)``, through which a gradient g comes back as ``back(g)`` (as it is by default)."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return ahead(x)
    out = _Through.apply(x, ahead, back)
    assert isinstance(out, Tensor)
    return out


def round_through(x: Tensor, fmt: Format) -> Tensor:
    """``round_to``, with the gradient of the identity. x [..., n, k] float32."""
    return x if fmt.is_exact else through(x, lambda value: round_to(value, fmt))


@dataclass(frozen=True)
class StraightMatrix(LowMatrix):
    """A matrix [k, o] whose products have gradients of low precision.

    forward: what multiplies forward, the low matrix itself or the FP32 one. What the base class holds serves the way
    back.
    """

    forward: LowMatrix

    def encode(self, x: Tensor, spent: bool = False) -> Rounded:
        """Rows x [n, k] as they are: a gradient has to find its way back to them."""
        return Rounded(x, None)

    def product(self, x: Rounded) -> Tensor:
        return self.multiply(x.values)

    def multiply(self, x: Tensor, spent: bool = False) -> Tensor:
        """Rows x [..., k] float32 -> float32 [..., o]"""
        return through(x, self.forward.multiply, self.back)

    def back(self, grad: Tensor) -> Tensor:
        """Gradient [..., o] -> low(gradient) @ low(W)^T [..., k]. Outputs' scales are taken in before it is rounded."""
        return self._transposed.multiply(grad if self.scale is None else grad * self.scale)

    @cached_property
    def _transposed(self) -> LowMatrix:
        return LowMatrix(self.fmt, self.values.T.contiguous(), None)
