"""How well a circuit does its task, beside the full model and the model on corrupted prompts."""

from __future__ import annotations

from typing import Any

import torch

from pahq.engine.full import patched_logits
from pahq.evaluation.circuit import Circuit
from pahq.model.transformer import Transformer
from pahq.task.base import Task
from pahq.task.metrics import LogitsReadout, get_metric
from pahq.task.prompts import Prompts
from pahq.task.score import logit_difference, read_logits


@torch.no_grad()
def behaviour(
    model: Transformer, circuit: Circuit, task: Task, prompts: Prompts, metric: str, ablation: str
) -> dict[str, Any]:
    """JSON-ready figures of the full model, of the circuit, and of the full model on the corrupted prompts.

    For each: ``metric`` (as minimised), ``accuracy`` (share of examples where a right answer wins) and
    ``logit_difference`` (right minus wrong); the last two are None for prompts without answers.
    Under mean ablation removed edges take the means of these very prompts, not of those the circuit was found on.
    """
    logits = {
        "full": read_logits(model, prompts, "clean"),
        "circuit": patched_logits(model, prompts, circuit.graph, circuit.mask, ablation),
        "corrupted": read_logits(model, prompts, "corrupt"),
    }
    measure = get_metric(metric, prompts, logits["full"])
    answered = bool(((prompts.answers >= 0).any(-1) | ~prompts.read_mask).all())
    figures: dict[str, Any] = {"prompts": len(prompts)}
    for name, value in logits.items():
        figures[name] = {
            "metric": float(measure(LogitsReadout(value))[0]),
            "accuracy": task.accuracy(value, prompts) if answered else None,
            "logit_difference": logit_difference(value, prompts) if answered else None,
        }
    return figures
