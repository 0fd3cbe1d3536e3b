"""Evaluating states of a circuit: fast (``Engine``) and whole (``full.patched_logits``)."""

from pahq.engine.batch import Batch
from pahq.engine.engine import Engine
from pahq.engine.marks import Marks, Reach

__all__ = ["Batch", "Engine", "Marks", "Reach"]
