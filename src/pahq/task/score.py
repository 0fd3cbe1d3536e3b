"""How well a model does a task: accuracy and logit difference from its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.model.transformer import Transformer
from pahq.task.prompts import Prompts, check_padding


def read_logits(model: Transformer, prompts: Prompts, which: str = "clean", batch: int = 16) -> Tensor:
    """The whole model's logits [N, P, V] at the positions read, on ``which`` ("clean" or "corrupt") prompts.

    Raises PahqError for padding that the model would attend to.
    """
    check_padding(prompts, model.config)
    tokens = {"clean": prompts.clean, "corrupt": prompts.corrupt}[which]
    parts = []
    for rows, read in zip(tokens.split(batch), prompts.read.split(batch), strict=True):
        residual = model.residual(rows)
        index = read[..., None].expand(-1, -1, residual.shape[-1])
        parts.append(model.unembed(residual.gather(1, index)))
    return torch.cat(parts)


def accuracy(logits: Tensor, prompts: Prompts, summed: bool = False) -> float:
    """Share of positions read at which the best right answer has a larger logit than every wrong one.

    logits [N, P, V]. summed: instead, the right answers' probabilities have the larger sum.
    Without wrong answers every other token is wrong (the right one must come first of all).
    """
    right, wrong = _sides(logits, prompts, "sum" if summed else "best")
    return float((right > wrong)[prompts.read_mask].double().mean())


def logit_difference(logits: Tensor, prompts: Prompts) -> float:
    """Mean logit of the right answers less that of the wrong ones, averaged over the positions read.

    logits [N, P, V]. Without wrong answers: the best right answer less the best other token.
    """
    right, wrong = _sides(logits, prompts, "mean")
    return float((right - wrong)[prompts.read_mask].double().mean())


def _sides(logits: Tensor, prompts: Prompts, how: str) -> tuple[Tensor, Tensor]:
    """One number for the right answers and one for the wrong ones, each [N, P]; any number where nothing is read."""
    given = [prompts.answers >= 0, prompts.wrong >= 0]
    if bool((~given[0].any(-1) & prompts.read_mask).any()):
        raise PahqError("score: some prompts have no answers; give them to measure accuracy")
    picked = [
        logits.gather(-1, ids.clamp(min=0)).masked_fill(~valid, float("-inf"))
        for ids, valid in zip((prompts.answers, prompts.wrong), given, strict=True)
    ]
    reduced = []
    for values, valid in zip(picked, given, strict=True):
        if how == "best":
            reduced.append(values.amax(-1))
        elif how == "sum":  # of probabilities; their common denominator does not change the comparison
            reduced.append(values.logsumexp(-1))
        else:
            reduced.append(torch.where(valid, values, 0.0).sum(-1) / valid.sum(-1).clamp(min=1))
    right, wrong = reduced
    alone = ~given[1].any(-1)
    if bool((alone & prompts.read_mask).any()):
        spare = logits.shape[-1]  # padding goes to an extra column
        ids = prompts.answers.masked_fill(~given[0], spare)
        others = torch.cat((logits, logits[..., :1]), -1).scatter(-1, ids, float("-inf"))[..., :-1]
        right = torch.where(alone, picked[0].amax(-1), right)
        wrong = torch.where(alone, others.amax(-1), wrong)
    return right, wrong
