"""The distribution of trained gates, against its definition and against many draws."""

from __future__ import annotations

import math

import pytest
import torch

from pahq.method import hard_concrete
from pahq.method.hard_concrete import BETA, GAMMA, ZETA

DRAWS = 200_000
LOCATIONS = [-6.0, -2.0, -0.5, 0.0, 0.7, 2.0, 5.0]


def plain_gate(log_alpha: float, u: float) -> float:
    """One gate, as Louizos et al. 2018 write it."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / BETA))
    return min(1.0, max(0.0, s * (ZETA - GAMMA) + GAMMA))


def draws(location: float, seed: int = 0) -> torch.Tensor:
    log_alpha = torch.full((DRAWS,), location, dtype=torch.float64)
    return hard_concrete.sample(log_alpha, torch.Generator().manual_seed(seed))


def test_gates_are_those_of_the_definition() -> None:
    for location in LOCATIONS:
        for u in (1e-6, 0.01, 0.2, 0.5, 0.77, 0.999):
            got = hard_concrete.gate(torch.tensor(location, dtype=torch.float64), torch.tensor(u, dtype=torch.float64))
            assert float(got) == pytest.approx(plain_gate(location, u), abs=1e-12)


@pytest.mark.parametrize("location", LOCATIONS)
def test_the_expected_l0_is_the_share_of_open_draws(location: float) -> None:
    drawn = draws(location)
    chance = float(hard_concrete.open_probability(torch.tensor(location, dtype=torch.float64)))
    assert float((drawn > 0).double().mean()) == pytest.approx(chance, abs=4 * math.sqrt(0.25 / DRAWS))
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) <= 1


def test_some_gates_are_wholly_open_and_some_wholly_closed() -> None:
    drawn = draws(0.0)
    assert float((drawn == 0).double().mean()) == pytest.approx(float((drawn == 1).double().mean()), abs=0.01)
    assert 0.1 < float((drawn == 0).double().mean()) < 0.3


def test_a_seed_gives_the_same_gates_in_every_dtype_and_other_seeds_others() -> None:
    assert torch.equal(draws(0.3), draws(0.3))
    assert not torch.equal(draws(0.3), draws(0.3, seed=1))
    single = hard_concrete.sample(torch.full((DRAWS,), 0.3), torch.Generator().manual_seed(0))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), draws(0.3), atol=1e-5, rtol=0)


def test_deterministic_gates_and_their_inverse() -> None:
    for value in (0.0, 0.1, 0.5, 0.9, 1.0):
        location = torch.tensor(hard_concrete.log_alpha_of(value), dtype=torch.float64)
        assert float(hard_concrete.deterministic(location)) == pytest.approx(value, abs=1e-12)
    assert float(hard_concrete.deterministic(torch.tensor(0.0))) == pytest.approx(0.5)
    rising = hard_concrete.open_probability(torch.linspace(-20, 20, 401, dtype=torch.float64))
    assert bool((rising.diff() > 0).all())


def test_the_gradient_of_a_draw_is_the_slope_of_its_formula() -> None:
    noise = torch.rand(50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    log_alpha = torch.linspace(-2, 2, 50, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hard_concrete.gate(x, noise), (log_alpha,))
    assert torch.autograd.gradcheck(hard_concrete.open_probability, (log_alpha,))
