"""Rounding to number formats against a twin that decodes every code from its bits and takes the nearest."""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pahq.errors import PahqError
from pahq.precision.formats import (
    FORMATS,
    dequantise,
    expand,
    get_format,
    quantise,
    require,
    round_to,
    row_scale,
)
from random_models import drawn

CPU = torch.device("cpu")
FLOATS = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}
"""Exponent bits, mantissa bits, bias."""
SCALED = ["e4m3", "e5m2", "int8"]
ALL = [*SCALED, "bf16", "e4m3-unscaled", "e4m3-overflow"]


def decode(code: int, name: str) -> float:
    """What eight bits mean, from the definition of the format."""
    exponent_bits, mantissa_bits, bias = FLOATS[name]
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & (2**mantissa_bits - 1)
    if name == "e4m3" and code & 0x7F == 0x7F:
        return math.nan  # e4m3fn has no infinities, and one NaN of each sign
    if name == "e5m2" and exponent == 2**exponent_bits - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


def ladder(name: str) -> list[float]:
    """All finite magnitudes in order; even places have an even last bit."""
    return [value for code in range(128) if math.isfinite(value := decode(code, name))]


LADDERS = {"e4m3": ladder("e4m3"), "e5m2": ladder("e5m2"), "int8": [float(i) for i in range(128)]}


def nearest(x: float, rungs: list[float]) -> float:
    """The nearest rung to x, of two equally near ones the even one; beyond the last one the last one."""
    size = abs(x)
    above = bisect_left(rungs, size)
    if above == len(rungs):
        found = rungs[-1]
    elif above == 0 or rungs[above] == size:
        found = rungs[above]
    else:
        down, up = size - rungs[above - 1], rungs[above] - size  # exact in double precision
        even = above if above % 2 == 0 else above - 1
        found = rungs[above - 1] if down < up else rungs[above] if up < down else rungs[even]
    return math.copysign(found, x)


def to_bf16(x: float) -> float:
    """The nearest number of an 8-bit significand, ties to even; below 2^-126 in steps of 2^-133."""
    if x == 0 or not math.isfinite(x):
        return x
    step = 2.0 ** (max(math.frexp(x)[1], -125) - 8)
    value = round(x / step) * step  # Python rounds halves to even
    return value if abs(value) < 2.0**128 else math.copysign(math.inf, x)


def twin(x: list[float], name: str) -> list[float]:
    """One row to the format and back, a number at a time, in double precision."""
    if name == "bf16":
        return [to_bf16(value) for value in x]
    if name.startswith("e4m3-"):
        halfway = (448 + 480) / 2  # a further step of 32 would be 480
        over = [math.nan if name == "e4m3-overflow" and abs(value) > halfway else None for value in x]
        return [nearest(v, LADDERS["e4m3"]) if o is None else o for v, o in zip(x, over, strict=True)]
    if not all(math.isfinite(value) for value in x):
        return [math.nan] * len(x)
    rungs = LADDERS[name]
    largest = max(max(map(abs, x)), 1e-30)
    if name == "int8":
        scale = float(torch.tensor(largest) / 127)
    else:
        scale = 2.0**-200
        while largest / scale > rungs[-1]:
            scale *= 2
    return [nearest(value / scale, rungs) * scale for value in x]


def rows(seed: int) -> Tensor:
    """Rows of all magnitudes: of their own, and within them."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 33, generator=draw)
    x *= 2.0 ** torch.randint(-12, 12, (40, 33), generator=draw)
    x *= 2.0 ** torch.randint(-60, 60, (40, 1), generator=draw)
    x[torch.rand(40, 33, generator=draw) < 0.1] = 0.0
    x[3] = 0.0
    return x


def same(ours: Tensor, theirs: list[list[float]], name: str, x: Tensor) -> None:
    """Bit for bit; for INT8, whose scales round, up to the last digit and but for ties."""
    expected = torch.tensor(theirs, dtype=torch.float64)
    if name != "int8":
        assert torch.equal(ours.nan_to_num(nan=1e39), expected.float().nan_to_num(nan=1e39))
        return
    scale = x.abs().amax(-1, keepdim=True).double().clamp(min=1e-30) / 127
    off = (ours.double() - expected).abs() / scale
    tie = ((x.double() / scale).frac().abs() - 0.5).abs() < 1e-4
    assert float(off[~tie].max()) < 1e-4
    assert not bool(tie.any()) or float(off[tie].max()) < 1.001


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(4))
def test_nearest_value_ties_to_even(name: str, seed: int) -> None:
    x = rows(seed)
    same(round_to(x, FORMATS[name]), [twin(row, name) for row in x.tolist()], name, x)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
@pytest.mark.parametrize("scale", [2.0**-40, 1.0, 2.0**17])
def test_every_code_and_every_tie(name: str, scale: float) -> None:
    """All numbers of a format, all halves between neighbours, and what lies next to those halves."""
    rungs = LADDERS[name]
    halves = [(a + b) / 2 for a, b in pairwise(rungs)]
    sizes = torch.tensor([*rungs, *halves], dtype=torch.float64).float()
    sizes = torch.cat((sizes, torch.nextafter(sizes, sizes + 1), torch.nextafter(sizes, sizes - 1)))
    sizes = sizes.clamp(-rungs[-1], rungs[-1])
    x = (torch.cat((sizes, -sizes)) * scale)[None]  # its largest is the format's largest, so that codes stay codes
    ours = round_to(x, FORMATS[name])
    same(ours, [twin(x[0].tolist(), name)], name, x)
    assert torch.equal(ours[0, : len(rungs)], x[0, : len(rungs)])


def test_bf16_ties() -> None:
    x = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 2**-133 * 1.5, 3.4e38]])
    ours = round_to(x, FORMATS["bf16"])
    same(ours, [twin(x[0].tolist(), "bf16")], "bf16", x)
    assert ours[0, :4].tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, -1.0]


@drawn(150)
@given(
    x=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
    name=st.sampled_from(ALL),
)
def test_any_finite_row(x: list[float], name: str) -> None:
    row = torch.tensor([x])
    same(round_to(row, FORMATS[name]), [twin(x, name)], name, row)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_scales_are_the_least_powers_of_two(name: str) -> None:
    """So that scaling never rounds, nothing saturates, and no step is wider than it has to be."""
    fmt, x = FORMATS[name], rows(0)
    scale, largest = row_scale(x, fmt), x.abs().amax(-1, keepdim=True)
    mantissa, _ = torch.frexp(scale)
    assert bool((mantissa == 0.5).all())
    some = largest > 0
    assert fmt.largest is not None
    assert bool((largest / scale <= fmt.largest)[some].all())
    assert bool((largest / scale > fmt.largest / 2)[some].all())
    exact = torch.tensor([[fmt.largest, 1.0], [fmt.largest * 4, -1.0]])
    assert row_scale(exact, fmt).flatten().tolist() == [1.0, 4.0]


@pytest.mark.parametrize("name", SCALED)
def test_zeros(name: str) -> None:
    rounded = quantise(torch.zeros(3, 5), FORMATS[name])
    assert rounded.scale is not None
    assert bool(torch.isfinite(rounded.scale).all())
    assert torch.equal(dequantise(rounded, FORMATS[name]), torch.zeros(3, 5))


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-32, 1e-20, 1e20, 3e38])
def test_extremes(name: str, size: float) -> None:
    """From subnormal numbers, which may vanish but do no harm, to the largest."""
    x = torch.tensor([[1.0, -0.75, 0.5, 0.01]]) * size
    ours = round_to(x, FORMATS[name])
    assert bool(torch.isfinite(ours).all())
    assert float((ours - x).abs().max()) <= max(0.125 * size, 1e-31)
    if size > 1e-29:
        assert float((ours / x - 1).abs()[0].max()) < (0.26 if name == "int8" else 0.125)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite(name: str, bad: float) -> None:
    x = rows(1)[:4]
    before = round_to(x, FORMATS[name])
    x[2, 7] = bad
    after = round_to(x, FORMATS[name])
    assert bool(after[2].isnan().all())
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])  # of the others none


def test_nan_stays_nan_without_scales() -> None:
    for name in ("bf16", "e4m3-unscaled", "e4m3-overflow"):
        ours = round_to(torch.tensor([[1.0, math.nan]]), FORMATS[name])
        assert ours[0, 0] == 1.0
        assert bool(ours[0, 1].isnan())


def test_saturation_and_overflow() -> None:
    x = torch.tensor([[448.0, 463.9, 464.0, 464.1, 1e9, -1e9, 449.0]])
    assert round_to(x, FORMATS["e4m3-unscaled"]).tolist() == [[448.0] * 5 + [-448.0, 448.0]]
    over = round_to(x, FORMATS["e4m3-overflow"])[0]
    assert over[[0, 1, 2, 6]].tolist() == [448.0] * 4
    assert bool(over[[3, 4, 5]].isnan().all())


@pytest.mark.parametrize("name", ALL)
def test_idempotent(name: str) -> None:
    x = torch.cat([rows(seed) for seed in range(5)]).clamp(-400, 400)
    fmt = FORMATS[name]
    if fmt.largest is not None and fmt.scaled:  # the largest number rounds up to the format's largest
        x[1] = torch.linspace(-1, 1, 33) ** 9 * fmt.largest * 0.999
    once = round_to(x, fmt)
    twice = round_to(once, fmt)
    if name == "int8":
        torch.testing.assert_close(twice, once, rtol=3e-7, atol=0)
    else:
        assert torch.equal(twice, once)


@pytest.mark.parametrize("name", ALL)
def test_rows_are_independent_and_input_is_left_alone(name: str) -> None:
    x = rows(2)
    before, fmt = x.clone(), FORMATS[name]
    whole = round_to(x, fmt)
    assert torch.equal(x, before)
    for i in range(len(x)):
        assert torch.equal(round_to(x[i : i + 1], fmt).nan_to_num(1e39), whole[i : i + 1].nan_to_num(1e39))
    assert torch.equal(round_to(x.view(4, 10, 33), fmt).nan_to_num(1e39), whole.view(4, 10, 33).nan_to_num(1e39))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_expand_every_code(name: str) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = expand(codes.view(FORMATS[name].storage))
    assert values.dtype == torch.bfloat16
    expected = torch.tensor([decode(code, name) for code in range(256)])
    torch.testing.assert_close(values.float(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(values[:128]), torch.zeros(128, dtype=torch.bool))
    assert bool(torch.signbit(values[128]))  # minus zero


@pytest.mark.parametrize("name", list(FORMATS))
def test_dequantise_gives_float32(name: str) -> None:
    x = rows(3)
    back = dequantise(quantise(x, FORMATS[name]), FORMATS[name])
    assert back.dtype == torch.float32
    assert back.shape == x.shape


def test_exact_formats_change_nothing() -> None:
    x = rows(4)
    assert round_to(x, FORMATS["fp32"]) is x
    assert quantise(x, FORMATS["fp32"]).values is x


def test_errors_name_the_format() -> None:
    with pytest.raises(PahqError, match=r"^format 'fp4' is unknown; choose one of fp32, "):
        get_format("fp4")
    with pytest.raises(PahqError, match=r"^format 'tf32': cpu has no TF32"):
        require(FORMATS["tf32"], CPU)
    with pytest.raises(PahqError, match=r"^format 'e4m3': mps devices cannot hold it"):
        require(FORMATS["e4m3"], torch.device("mps"))
    for name in ("fp32", "bf16", "e4m3", "e5m2", "int8"):
        require(FORMATS[name], CPU)
