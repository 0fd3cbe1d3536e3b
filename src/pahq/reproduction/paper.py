"""Figures as published, to stand beside what is measured here."""

from __future__ import annotations

PAHQ_THRESHOLDS = (0.001, 0.005, 0.01)
"""Wang et al. 2025, all tasks and metrics."""

SOURCES = (
    "paper: AUC of ACDC on ioi and of RTN-Q, times, memory: Wang et al. 2025 (arXiv 2510.23264); "
    "other AUC of ACDC, pessimistic: Conmy et al. 2023, its committed results with random ablation"
)

AUC: dict[tuple[str, str, str], str] = {
    ("ioi", "kl", "acdc"): "0.982",
    ("ioi", "kl", "pahq-values"): ">= 0.94 at 0.001; 0.89 to 0.96 over tasks",
    ("greaterthan", "kl", "pahq-values"): "0.89 to 0.96 over tasks",
    ("docstring", "kl", "pahq-values"): "0.89 to 0.96 over tasks",
    ("ioi", "kl", "rtn"): "0.534",
}
"""(task, kind of metric, method) -> area over edges, as far as it is printed."""

ACDC_PESSIMISTIC: dict[tuple[str, str], tuple[float, float]] = {
    ("ioi", "kl"): (0.869, 0.880),
    ("ioi", "task"): (0.589, 0.777),
    ("greaterthan", "kl"): (0.853, 0.890),
    ("greaterthan", "task"): (0.461, 0.766),
    ("docstring", "kl"): (0.982, 0.950),
    ("docstring", "task"): (0.972, 0.938),
}
"""(task, kind of metric) -> ACDC's pessimistic area over edges and over nodes."""

MINUTES = {"acdc": 94.0, "pahq-values": 20.0}
"""IOI on GPT-2 small, one H20."""
MEMORY_SHARE = 0.70
"""PAHQ's memory as a share of ACDC's: about 30 % less."""

STREAMS = {"all": 20.0, "no_load": 49.0, "no_split": 72.0, "none": 94.0}
"""Minutes of the same run by the streams in use."""

RTN_AUC = 0.534

GPT2_IOI: dict[float, tuple[int, float, float | None]] = {
    0.0251: (168, 2.145, None),
    0.01: (330, 0.580, 10_100),
    0.001: (698, 0.261, 12_800),
    0.0001: (1_948, 0.063, 21_400),
}
"""ACDC with KL, threshold -> edges kept, KL on test prompts, most edges tested."""


def acdc_thresholds(task: str, kind: str) -> tuple[float, ...]:
    """The sweep of Conmy et al. 2023: 31 thresholds of KL on ioi and greaterthan, 21 elsewhere, equal log steps."""
    low, high, count = -4.0, 0.0, 21
    if task in ("ioi", "greaterthan") and kind == "kl":
        low, count = -6.0, 31
    elif task == "greaterthan":
        low, high = -3.0, -1.0
    return tuple(10 ** (low + (high - low) * step / (count - 1)) for step in range(count))
