"""Gates between 0 and 1 that are exactly 0 or 1 much of the time, and can be trained. Louizos et al. 2018, section 2.2.

A gate is a binary concrete variable stretched to (GAMMA, ZETA) and cut off at 0 and 1. All that is trained is the
location of each, ``log_alpha``; the chance that a gate is open (not 0) is a smooth function of it, so that the
expected number of open gates, the expected L0 norm, can be a part of the loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and ends of the stretched interval, as in the paper."""
_SHIFT = BETA * math.log(-GAMMA / ZETA)
_SMALLEST = 1e-12


def sample(log_alpha: Tensor, generator: torch.Generator) -> Tensor:
    """Gates drawn at random, in the shape and dtype of ``log_alpha``, differentiable with respect to it.

    generator: of the CPU; draws are float64 whatever the dtype, so that they are the same everywhere.
    """
    noise = torch.rand(log_alpha.shape, generator=generator, dtype=torch.float64).clamp(_SMALLEST, 1 - _SMALLEST)
    return gate(log_alpha, noise.to(log_alpha.device))


def gate(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """The gates that uniform noise in (0, 1) gives: equation 10 of the paper."""
    return _stretch(torch.sigmoid((torch.logit(noise).to(log_alpha.dtype) + log_alpha) / BETA))


def deterministic(log_alpha: Tensor) -> Tensor:
    """The gates to use once trained: equation 13 of the paper."""
    return _stretch(torch.sigmoid(log_alpha))


def open_probability(log_alpha: Tensor) -> Tensor:
    """The chance that a gate is not 0; their sum is the expected L0 norm (equation 12 of the paper)."""
    return torch.sigmoid(log_alpha - _SHIFT)


def log_alpha_of(gate: float) -> float:
    """The location whose deterministic gate is ``gate``, which lies in [0, 1]."""
    share = (gate - GAMMA) / (ZETA - GAMMA)
    return math.log(share / (1 - share))


def _stretch(value: Tensor) -> Tensor:
    return (value * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)
