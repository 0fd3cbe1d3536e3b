"""Known circuits: what a method's scores and masks are held against."""

from pahq.evaluation.truth.base import Truth, load_truth, node_mask, node_names, read_truth, truth_names

__all__ = ["Truth", "load_truth", "node_mask", "node_names", "read_truth", "truth_names"]
