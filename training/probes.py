"""Linear probes that hold the circuit's nodes to the program's variables while training starts; thrown away after."""

from __future__ import annotations

import torch
from torch import Tensor

from pahq.evaluation.truth.program import Program


class Probes:
    """One linear classifier for each head or MLP of the circuit, from what it writes to the variable it stands for.

    Without them a chain of steps is found only once all of its links happen to be there: long plateaus, or none end.
    """

    def __init__(self, program: Program, columns: dict[str, int], d_model: int, generator: torch.Generator) -> None:
        """columns: place of every sender in a pass's ``written``."""
        self.program = program
        values = _variables(program, program.draw(2, generator))
        self.columns = {sender: columns[sender] for sender in values}
        classes = max(program.d_vocab, program.length) + 1
        self.weights = {
            sender: (torch.randn(d_model, classes, generator=generator) / d_model**0.5).requires_grad_()
            for sender in values
        }

    def losses(self, tokens: Tensor, parts: list[Tensor]) -> dict[str, Tensor]:
        """Every probe's cross-entropy by its node, all values of the variable counting alike.

        tokens [B, T]; parts: what senders write, [B, some, T, d] each.
        """
        written = torch.cat(parts, dim=1)
        found: dict[str, Tensor] = {}
        for sender, value in _variables(self.program, tokens).items():
            at = written[:, self.columns[sender]]
            at = at if value.ndim == 2 else at[:, -1]
            logits = at @ self.weights[sender]
            classes = value.long().flatten() + 1
            rare = 1 / torch.bincount(classes, minlength=logits.shape[-1]).clamp(min=1)  # most positions have nothing
            found[sender] = torch.nn.functional.cross_entropy(logits.flatten(0, -2), classes, weight=rare)
        return found


def _variables(program: Program, tokens: Tensor) -> dict[str, Tensor]:
    """What each head or MLP of the circuit sends: [B] at the last position, or [B, T]; -1 stands for nothing."""
    found: dict[str, Tensor] = {}

    def note(edge: str, value: Tensor) -> Tensor:
        sender = edge.split("->")[0]
        if sender not in ("embed", "direct"):
            found[sender] = value
        return value

    program.solve(tokens, note)
    return found
