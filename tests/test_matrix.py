"""Products of low-precision matrices against products of the numbers they stand for, in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pahq.precision.formats import FORMATS, Rounded, dequantise, quantise
from pahq.precision.matrix import LowMatrix, low_matrix

LOW = ["bf16", "e4m3", "e5m2", "int8", "e4m3-unscaled"]
SIZES = [(16, 16), (32, 64), (64, 32), (17, 5), (5, 17), (1, 7), (7, 1), (33, 48), (48, 33), (576, 64)]
"""Square and not, aligned as GPU kernels ask for and not: (inner, outer)."""
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stands_for(matrix: LowMatrix) -> Tensor:
    """The matrix [k, o] in double precision."""
    scale = None if matrix.scale is None else matrix.scale[:, None]
    return dequantise(Rounded(matrix.values, scale), matrix.fmt).double().T


def within_rounding(ours: Tensor, x: Tensor, w: Tensor, leaves_as_bf16: bool) -> None:
    """ours against x @ w: FP32's rounding of sums and, where the unit gives BF16, that of the result."""
    exact, size = x @ w, x.abs() @ w.abs()
    bound = (x.shape[-1] + 6) * 2.0**-24 * size + (2.0**-8 * 1.01 * exact.abs() if leaves_as_bf16 else 0)
    excess = (ours.double() - exact).abs() - bound
    assert float(excess.max()) <= 1e-30


@pytest.mark.parametrize("name", ["fp32", *LOW])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_product_is_that_of_the_rounded_numbers(name: str, size: tuple[int, int], rows: int) -> None:
    x, weight = random(rows, size[0]) * 3, random(*size, seed=1) / 4
    weight[:, 0] *= 50  # outputs of very different sizes
    x[0] *= 1e-3
    matrix = low_matrix(weight, name)
    ours = matrix.multiply(x)
    assert ours.dtype == torch.float32
    assert ours.shape == (rows, size[1])
    rounded = dequantise(quantise(x, FORMATS[name]), FORMATS[name]).double()
    within_rounding(ours, rounded, stands_for(matrix), name not in ("fp32", "int8"))


@pytest.mark.parametrize("name", ["bf16", "e4m3", "e5m2", "int8"])
@pytest.mark.parametrize("size", [(24, 24), (24, 40)], ids=str)
def test_product_is_near_the_true_one(name: str, size: tuple[int, int]) -> None:
    """x @ W, not x @ W transposed, with errors as the format's digits let expect."""
    x, weight = random(30, size[0]), random(*size, seed=1)
    error = (low_matrix(weight, name).multiply(x) - x @ weight).norm() / (x @ weight).norm()
    assert float(error) < {"bf16": 0.005, "int8": 0.015, "e4m3": 0.05, "e5m2": 0.1}[name]


@pytest.mark.parametrize("name", LOW)
def test_storage(name: str) -> None:
    weight = random(24, 40)
    matrix, fmt = low_matrix(weight, name), FORMATS[name]
    assert matrix.values.shape == (40, 24)  # by output
    assert matrix.values.is_contiguous()
    assert matrix.values.dtype == fmt.storage
    assert matrix.nbytes == 40 * 24 * fmt.bits // 8 + (40 * 4 if fmt.scaled else 0)
    if fmt.scaled:  # an output's scale is its own
        small = weight.clone()
        small[:, 3] *= 2.0**-20
        again = low_matrix(small, name)
        assert torch.equal(again.values[3].float(), matrix.values[3].float())


def test_exact_matrices_are_the_weights_themselves() -> None:
    weight = random(24, 40)
    assert low_matrix(weight, "fp32").values.data_ptr() == weight.data_ptr()
    assert torch.equal(low_matrix(weight, "fp32").multiply(random(3, 24)), random(3, 24) @ weight)


@pytest.mark.parametrize("name", ["fp32", *LOW])
@pytest.mark.parametrize("outputs", [slice(4, 20), torch.tensor([3, 1, 9])], ids=["slice", "list"])
def test_part(name: str, outputs: slice | Tensor) -> None:
    matrix, x = low_matrix(random(24, 40), name), random(6, 24)
    part, encoded = matrix.part(outputs), matrix.encode(x)
    torch.testing.assert_close(part.product(encoded), matrix.product(encoded)[:, outputs], rtol=5e-3, atol=1e-6)
    assert torch.equal(stands_for(part), stands_for(matrix)[:, outputs])


@pytest.mark.parametrize("name", LOW)
def test_leading_dimensions(name: str) -> None:
    matrix, x = low_matrix(random(24, 40), name), random(2, 3, 5, 24)
    assert torch.equal(matrix.multiply(x).view(30, 40), matrix.multiply(x.view(30, 24)))


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "int8", "bf16"])
def test_nan_in_a_row_spoils_that_row_alone(name: str) -> None:
    x, matrix = random(4, 24), low_matrix(random(24, 40), name)
    clean = matrix.multiply(x)
    x[2, 5] = float("nan")
    out = matrix.multiply(x)
    assert bool(out[2].isnan().all())
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


def test_int8_products_are_exact() -> None:
    """127 * 127 * 4096 needs more digits than FP32 has; the integer sum has them until it is scaled."""
    x, weight = torch.full((1, 4096), 127.0), torch.full((4096, 8), 127.0)
    weight[0] = 126.0
    assert low_matrix(weight, "int8").multiply(x)[0, 0] == torch.tensor(127.0 * (127.0 * 4095 + 126.0))


@needs_gpu
@pytest.mark.parametrize("name", ["tf32", *LOW])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 17, 40])
def test_gpu_agrees_with_the_emulation(name: str, size: tuple[int, int], rows: int) -> None:
    x, weight = random(rows, size[0]) * 3, random(*size, seed=1) / 4
    here = low_matrix(weight, "fp32" if name == "tf32" else name)
    there = low_matrix(weight.cuda(), name)
    codes = (here.values.view(torch.uint8), there.values.cpu().contiguous().view(torch.uint8))
    assert torch.equal(*codes) or name == "tf32"
    ours = there.multiply(x.cuda()).cpu()
    size_of = x.abs() @ weight.abs()
    room = 2e-3 if name == "tf32" else 2.0**-22 * size[0]
    excess = (ours - here.multiply(x)).abs() - room * size_of
    if name not in ("int8", "tf32"):
        excess -= 2.0**-8 * ours.abs()  # sums in another order may round to the neighbouring BF16 number
    assert float(excess.max()) <= 0
