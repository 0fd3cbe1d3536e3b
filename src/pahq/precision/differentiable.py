"""A model that computes as a precision policy says and can be differentiated: what gradient methods work on.

Policies that quantise values give the rounded model, gradients passing straight through every rounding. Policies
that quantise differences run forward in FP32, as the engine's base states do; a gradient is to such a pass what a
difference is to a state, so every product on the way back is one of low precision. Only products' gradients are
rounded: sums of them, norms, nonlinearities and attention's own products stay FP32, and so do the inner products of
gradients and activations that give scores. There is no edge under test here: ``under_test`` has no effect.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pahq.model.transformer import Transformer
from pahq.precision.matrix import low_matrix
from pahq.precision.policy import FP32, Policy
from pahq.precision.store import WeightStore
from pahq.precision.straight import StraightMatrix, through
from pahq.precision.values import RoundedTransformer, fields_of, rounded_model


@dataclass(frozen=True, kw_only=True)
class DifferentiableTransformer(RoundedTransformer):
    """A rounded transformer whose unembedding, too, sends back gradients of low precision.

    policy: that of the values (FP32 where a policy quantises differences).
    """

    low_unembed: StraightMatrix

    def times_unembedding(self, h: Tensor) -> Tensor:
        return through(h, super().times_unembedding, self.low_unembed.back)


class _StraightStore(WeightStore):
    """A store whose matrices have gradients. Forward they are FP32 where differences are quantised."""

    def matrix(self, name: str, layer: int = 0, index: int = 0) -> StraightMatrix:
        low = super().matrix(name, layer, index)
        forward = low
        if self.policy.differences:
            forward = low_matrix(self.master(name, layer, index).to(self.device), "fp32")
        return StraightMatrix(low.fmt, low.values, low.scale, forward)


def differentiable(model: Transformer, policy: Policy) -> Transformer:
    """``model`` as ``policy`` computes it, for passes with gradients; FP32 gives the model itself.

    Raises PahqError where the device lacks a format, or the model is not in FP32 as low precision asks. Source of
    the policies: Wang et al. 2025.
    """
    policy.require(model.device, model.dtype)
    if policy.is_fp32:
        return model
    store = _StraightStore(model, policy)
    rounded = rounded_model(model, policy if policy.values else FP32, store)
    return DifferentiableTransformer(**fields_of(rounded), low_unembed=store.matrix("unembed"))


def computed(model: Transformer, policy: Policy) -> Transformer:
    """``model`` as ``policy`` computes passes without gradients: FP32 unless values are quantised.

    Raises PahqError as ``differentiable`` does.
    """
    policy.require(model.device, model.dtype)
    return rounded_model(model, policy, WeightStore(model, policy)) if policy.values else model
