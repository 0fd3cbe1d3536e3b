"""Products by blocks of a large matrix against one product in double precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pahq.model.products import BLOCK, FEW_ROWS, MOST_BLOCKS, long, wide

Product = Callable[[Tensor, Tensor], Tensor]
BOTH = pytest.mark.parametrize("product", [wide, long])
SIZES = [BLOCK // 2, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK - 1, MOST_BLOCKS * (BLOCK + 1) + 5]


def factors(product: Product, rows: tuple[int, ...], size: int, transposed: bool) -> tuple[Tensor, Tensor]:
    """Random rows and a matrix with one side of ``size``, stored by row or by column."""
    generator = torch.Generator().manual_seed(size)
    shape = (7, size) if product is wide else (size, 7)
    weight = torch.randn(shape[::-1] if transposed else shape, generator=generator)
    weight = weight.T if transposed else weight
    return torch.randn(*rows, shape[0], generator=generator), weight


@BOTH
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [(), (1,), (2, 3), (FEW_ROWS,), (FEW_ROWS + 1,), (0,)])
def test_the_product_is_the_product(product: Product, size: int, transposed: bool, rows: tuple[int, ...]) -> None:
    x, weight = factors(product, rows, size, transposed)
    found, wanted = product(x, weight), x.double() @ weight.double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-3)


@BOTH
def test_few_rows_are_multiplied_by_blocks(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.Size] = []
    bmm = torch.bmm

    def noted(x: Tensor, y: Tensor) -> Tensor:
        taken.append(y.shape)
        return bmm(x, y)

    monkeypatch.setattr(torch, "bmm", noted)
    for rows in (1, FEW_ROWS, FEW_ROWS + 1):
        product(*factors(product, (rows,), 2 * BLOCK + 5, True))
    block = (2, 7, BLOCK) if product is wide else (2, BLOCK, 7)
    assert taken == [torch.Size(block)] * 2


def test_a_long_matrix_has_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    bmm = torch.bmm

    def noted(x: Tensor, y: Tensor) -> Tensor:
        counts.append(len(y))
        return bmm(x, y)

    monkeypatch.setattr(torch, "bmm", noted)
    long(*factors(long, (2,), 50 * BLOCK + 3, False))
    assert counts == [MOST_BLOCKS]


@BOTH
def test_gradients_pass_through_blocks(product: Product) -> None:
    x, weight = (factor.double() for factor in factors(product, (3,), 2 * BLOCK + 5, True))
    towards = torch.randn(3, weight.shape[1], dtype=torch.float64)
    x.requires_grad_()
    (product(x, weight) * towards).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, towards @ weight.T)
