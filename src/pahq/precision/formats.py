"""Number formats and how values are rounded to them, the same on every device.

A tensor is quantised row by row: scale to the format's range, round to nearest even, saturate.
Scales of floating-point formats are powers of two, so that scaling itself never rounds: a product
then comes out the same whether a kernel scales before or after it rounds its result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pahq.errors import PahqError

TINY = 1e-30
"""The largest magnitude of a row counts for at least this much, so that a row of zeros has a scale."""


@dataclass(frozen=True)
class Format:
    """One number format.

    bits: storage of one number. largest: largest finite magnitude, None where FP32's exponents are kept.
    scaled: whether rows are scaled to ``largest``. saturates: what lies beyond becomes ``largest``, else NaN.
    """

    name: str
    bits: int
    storage: torch.dtype
    largest: float | None = None
    scaled: bool = False
    saturates: bool = True
    about: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether a product of FP32 numbers needs no rounding of its inputs."""
        return self.name == "fp32"


_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("fp32", 32, torch.float32, about="IEEE single precision"),
        Format("tf32", 32, torch.float32, about="FP32 storage, products of 10-bit mantissas (NVIDIA, from Ampere on)"),
        Format("bf16", 16, torch.bfloat16, about="FP32's exponents, 8-bit significand"),
        Format("e4m3", 8, _E4M3, 448.0, scaled=True, about="FP8, 4-bit significand, scaled by row"),
        Format("e5m2", 8, _E5M2, 57344.0, scaled=True, about="FP8, 3-bit significand, scaled by row"),
        Format("int8", 8, torch.int8, 127.0, scaled=True, about="integers -127 to 127, scaled by row"),
        Format("e4m3-unscaled", 8, _E4M3, 448.0, about="FP8 without scales, saturating at 448"),
        Format("e4m3-overflow", 8, _E4M3, 448.0, saturates=False, about="FP8 without scales, NaN beyond 448"),
    )
}


@dataclass(frozen=True)
class Rounded:
    """Rows in a format. values [..., n, k] in its storage type; scale [..., n, 1] float32, None if unscaled."""

    values: Tensor
    scale: Tensor | None


def get_format(name: str) -> Format:
    """Raises PahqError for an unknown name."""
    if name not in FORMATS:
        raise PahqError(f"format '{name}' is unknown; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def require(fmt: Format, device: torch.device) -> None:
    """Raises PahqError where a device has neither the format's arithmetic nor a way to emulate it."""
    if fmt.name == "tf32":
        if device.type != "cuda":
            raise PahqError(f"format 'tf32': {device} has no TF32 arithmetic; use bf16, fp32, or a GPU from Ampere on")
        if torch.cuda.get_device_capability(device)[0] < 8:
            raise PahqError(f"format 'tf32': {torch.cuda.get_device_name(device)} has no TF32; use bf16 or fp32")
    if fmt.bits == 8 and device.type not in ("cpu", "cuda"):
        raise PahqError(f"format '{fmt.name}': {device.type} devices cannot hold it; use bf16 or fp32, or the CPU")


def quantise(x: Tensor, fmt: Format, spent: bool = False) -> Rounded:
    """x [..., n, k] float32 -> its rows in ``fmt``. Where rows are scaled, one with NaN or infinity becomes NaN.

    spent: x is not needed any more, and may be overwritten.
    """
    if fmt.name in ("fp32", "tf32"):
        return Rounded(x, None)
    if fmt.largest is None:
        return Rounded(x.to(fmt.storage), None)
    scale = None
    if fmt.scaled:
        scale = row_scale(x, fmt)
        x = x.mul_(scale.reciprocal()) if spent else x * scale.reciprocal()
    if fmt.storage == torch.int8:
        # scaled, nothing lies beyond 127
        return Rounded((x.round_() if fmt.scaled else x.round().clamp_(-127.0, 127.0)).to(torch.int8), scale)
    # Clamped by hand: whether a cast saturates or overflows depends on the version of torch.
    beyond = None if fmt.saturates else x.abs() > 464.0  # halfway between 448 and the next step rounds back to 448
    values = x.clamp(-fmt.largest, fmt.largest).to(fmt.storage)
    if beyond is not None and bool(beyond.any()):
        values = torch.where(beyond, float("nan"), values.float()).to(fmt.storage)
    return Rounded(values, scale)


def row_scale(x: Tensor, fmt: Format) -> Tensor:
    """The scale [..., n, 1] of each row of x [..., n, k]: what a value of 1 in ``fmt`` stands for."""
    assert fmt.largest is not None
    largest = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))  # without a copy as x.abs() makes
    wanted = largest.clamp(min=TINY) / fmt.largest
    if fmt.storage != torch.int8:
        # wanted = m * 2^exponent with 1/2 <= m < 1: the least power of two that is not below it
        mantissa, exponent = torch.frexp(wanted)
        wanted = torch.ldexp(torch.ones_like(wanted), exponent - (mantissa == 0.5).int())
    return wanted + (largest - largest)  # NaN where it is infinite or NaN


def dequantise(rounded: Rounded, fmt: Format) -> Tensor:
    """The float32 values [..., n, k] that ``rounded`` stands for."""
    values = expand(rounded.values).float() if fmt.bits == 8 and fmt.storage != torch.int8 else rounded.values.float()
    return values if rounded.scale is None else values * rounded.scale


def round_to(x: Tensor, fmt: Format) -> Tensor:
    """x [..., n, k] through the format and back, in float32."""
    return x if fmt.name in ("fp32", "tf32") else dequantise(quantise(x, fmt), fmt)


def expand(values: Tensor) -> Tensor:
    """FP8 numbers as BF16, which holds all of them. (torch's own conversion is many times slower on CPUs.)"""
    if values.device.type != "cpu":
        return values.to(torch.bfloat16)
    bits = values.view(torch.uint8).to(torch.int16)
    if values.dtype == torch.float8_e5m2:
        return (bits << 8).view(torch.float16).to(torch.bfloat16)
    # sign, exponent and mantissa at their places in BF16 give the number times 2^-120 (its NaN becomes 480)
    out = ((bits & 0x80) << 8 | (bits & 0x7F) << 4).view(torch.bfloat16).mul_(2.0**120)
    return out.masked_fill_(out.abs() > 448, float("nan"))
