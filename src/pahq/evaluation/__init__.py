"""What a circuit is, and how well it does the task."""

from pahq.evaluation.circuit import Circuit, Edge

__all__ = ["Circuit", "Edge"]
