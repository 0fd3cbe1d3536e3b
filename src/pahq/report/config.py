"""Everything that decides a run's result, as one value: the command line, the start record and resume share it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pahq.errors import PahqError

METHODS = ("acdc",)
CHOICES = {
    "method": METHODS,
    "ablation": ("resample", "zero", "mean"),
    "head_order": ("descending", "ascending"),
    "sender_order": ("latest", "earliest"),
    "dtype": ("float32", "float64"),
    "under_test": ("none", "sender", "receiver", "both"),
}


@dataclass(frozen=True)
class RunConfig:
    """The options of one run. Names are those of ``pahq discover``.

    model: what ``load_model`` takes as text; task: a task's name or a prompt file.
    threshold: an edge goes if cutting it raises the metric by less than this.
    metric: None stands for the task's own metric.
    n, seed: number of prompts and the seed that draws them.
    task_options: options of the task itself, such as ``{"templates": 8}``; pad is short for one of them.
    full_vocabulary: sum over the whole vocabulary for every state; otherwise states far from the threshold
        are measured by their likely tokens, which changes no decision but rounds their recorded effects.
    policy: what computes in which format: a name, a table or a file, see ``precision.policy`` (which judges it);
        under_test: heads of the edge under test that stay FP32, None: the policy's own.
    exact: have decisions that low precision cannot bear taken in FP32, None: wherever the policy allows it.
    check: decide everything in FP32 as well, and report disagreements.
    Raises PahqError for a value that no run can have.
    """

    model: str
    task: str
    threshold: float
    method: str = "acdc"
    metric: str | None = None
    n: int = 16
    seed: int = 0
    ablation: str = "resample"
    absolute: bool = False
    head_order: str = "descending"
    sender_order: str = "latest"
    split_qkv: bool = True
    direct_edges: bool = True
    split_pos: bool = False
    fold_ln: bool = False
    center_writing: bool = False
    center_unembed: bool = False
    fold_value_biases: bool = False
    pad: bool = False
    task_options: dict[str, Any] = field(default_factory=dict)
    full_vocabulary: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    policy: str = "fp32"
    under_test: str | None = None
    exact: bool | None = None
    check: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, int | float) or not math.isfinite(self.threshold) or self.threshold < 0:
            raise PahqError(f"threshold: {self.threshold} is not a finite number of at least 0; give one such as 0.05")
        if self.n < 1:
            raise PahqError(f"n: {self.n} prompts are too few; give at least 1")
        if not 0 <= self.seed < 2**63:
            raise PahqError(f"seed: {self.seed} lies outside 0 … 2^63 - 1; give one inside")
        for option, allowed in CHOICES.items():
            value = getattr(self, option)
            if value not in allowed and not (option == "under_test" and value is None):
                raise PahqError(f"{option}: '{value}' is unknown; known: {', '.join(allowed)}")
        for option, value, known in (
            ("exact", self.exact, (bool, type(None))),
            ("check", self.check, (bool,)),
            ("policy", self.policy, (str,)),
        ):
            if not isinstance(value, known):
                mend = "a name, a table or a file" if option == "policy" else "True or False"
                raise PahqError(f"{option}: {value!r} is a {type(value).__name__}; give {mend}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> RunConfig:
        """The inverse of ``to_dict``; ``where`` names the file in the error of a damaged record."""
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            odd = ", ".join(sorted(set(values) ^ names))
            raise PahqError(f"{where}: the record has other options than this version of pahq ({odd}); start anew")
        return cls(**values)

    def difference(self, other: RunConfig) -> str | None:
        """The first option in which ``other`` differs, as ``threshold is 0.05 there, 0.1 here``; else None."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if mine != theirs:
                return f"{f.name} is {theirs} there, {mine} here"
        return None

    def call(self, out: str | None = None) -> str:
        """The Python call that makes this run."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        default = {f.name: {} if f.name == "task_options" else f.default for f in fields(self)}
        words = [f"{name}={value!r}" for name, value in given.items() if value != default[name]]
        return f"pahq.discover({', '.join(words + ([] if out is None else [f'out={out!r}']))})"
