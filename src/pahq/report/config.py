"""Everything that decides a run's result, as one value: the command line, the start record and resume share it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pahq.errors import PahqError, choices
from pahq.method.registry import METHODS, RULES, SCORING, get_method

CHOICES = {
    "method": tuple(METHODS),
    "select": RULES,
    "prefilter": SCORING,
    "ablation": ("resample", "zero", "mean"),
    "head_order": ("descending", "ascending"),
    "sender_order": ("latest", "earliest"),
    "dtype": ("float32", "float64"),
    "under_test": ("none", "sender", "receiver", "both"),
}
OBJECT = "object:"
"""Marks a model or task in a record that was given as a Python object, not by name."""
SWEEP_ONLY = ("head_order", "sender_order", "full_vocabulary", "exact", "check", "prefilter", "keep", "order_by_score")
"""Options that mean nothing to a method which scores edges."""
ADDED = ("edges", "select", "method_options", "prefilter", "keep", "order_by_score")
"""Options that records of earlier versions lack."""


@dataclass(frozen=True)
class RunConfig:
    """The options of one run. Names are those of ``pahq discover``.

    model: what ``load_model`` takes as text; task: a task's name or a prompt file.
    threshold: an edge goes if cutting it raises the metric by less than this; methods that score edges keep those
        with at least this score.
    edges, select: how many edges methods that score them keep, and by which rule of ``method.select`` (None: ``top``
        with a number of edges, else ``threshold``). method_options: options of the method, or of ``prefilter``'s.
    prefilter, keep, order_by_score: a method whose scores leave ACDC this share of the edges, and whether a receiver's
        senders are tested from the least score up.
    absolute: go by the size of effects or scores, whatever their sign; None: as the method does (``by_size``).
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
    threshold: float | None = None
    method: str = "acdc"
    metric: str | None = None
    n: int = 16
    seed: int = 0
    ablation: str = "resample"
    absolute: bool | None = None
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
    edges: int | None = None
    select: str | None = None
    method_options: dict[str, Any] = field(default_factory=dict)
    prefilter: str | None = None
    keep: float | None = None
    order_by_score: bool = False

    def __post_init__(self) -> None:
        threshold = self.threshold
        if threshold is not None and (
            not isinstance(threshold, int | float) or not math.isfinite(threshold) or threshold < 0
        ):
            raise PahqError(f"threshold: {threshold} is not a finite number of at least 0; give one such as 0.05")
        if self.n < 1:
            raise PahqError(f"n: {self.n} prompts are too few; give at least 1")
        if not 0 <= self.seed < 2**63:
            raise PahqError(f"seed: {self.seed} lies outside 0 … 2^63 - 1; give one inside")
        for option, allowed in CHOICES.items():
            value = getattr(self, option)
            if value not in allowed and not (option in ("under_test", "select", "prefilter") and value is None):
                raise PahqError(f"{option}: '{value}' is unknown; {choices(value, allowed)}")
        for option, value, known in (
            ("exact", self.exact, (bool, type(None))),
            ("absolute", self.absolute, (bool, type(None))),
            ("check", self.check, (bool,)),
            ("order_by_score", self.order_by_score, (bool,)),
            ("policy", self.policy, (str,)),
        ):
            if not isinstance(value, known):
                mend = "a name, a table or a file" if option == "policy" else "True or False"
                raise PahqError(f"{option}: {value!r} is a {type(value).__name__}; give {mend}")
        if self.absolute is None:  # so that records say what was done
            object.__setattr__(self, "absolute", get_method(self.method).by_size)
        if get_method(self.method).scores_edges:
            self._check_scoring()
        else:
            self._check_sweep()

    @property
    def rule(self) -> str:
        """How a method that scores edges chooses among them."""
        return self.select or ("threshold" if self.edges is None else "top")

    def _check_scoring(self) -> None:
        """Raises PahqError for options that do not go with a method that scores edges, or with each other."""
        defaults = {f.name: f.default for f in fields(self)}
        for option in SWEEP_ONLY:
            if getattr(self, option) != defaults[option]:
                raise PahqError(
                    f"{option}: {getattr(self, option)!r} goes with method acdc alone; leave it out with {self.method}"
                )
        if self.edges is not None and (type(self.edges) is not int or self.edges < 1):
            raise PahqError(f"edges: {self.edges!r} is no number of edges; give a whole number of at least 1")
        if self.edges is not None and self.threshold is not None:
            raise PahqError(
                f"edges: {self.edges} and threshold {self.threshold:g} exclude each other; give one of them"
            )
        if self.rule == "threshold" and self.edges is not None:
            raise PahqError(
                "select: 'threshold' takes no number of edges; give threshold instead, or take top or greedy"
            )
        if self.rule != "threshold" and self.edges is None:
            raise PahqError(f"select: '{self.rule}' takes a number of edges; give edges")
        method = get_method(self.method)
        if self.edges is None and self.threshold is None and not method.sets_threshold(self.method_options):
            what = f" without {method.natural_how}" if method.natural_how else ""
            raise PahqError(
                f"edges: method {self.method} sets no threshold of its own{what}; give edges, such as 200, or threshold"
            )

    def _check_sweep(self) -> None:
        """The same for ACDC."""
        for option in ("edges", "select"):
            if getattr(self, option) is not None:
                raise PahqError(
                    f"{option}: {getattr(self, option)!r} goes with methods that score edges; leave it out with acdc"
                )
        if self.threshold is None:
            raise PahqError("threshold: method acdc needs one; give one such as 0.05")
        if self.prefilter is None:
            for option in ("keep", "order_by_score", "method_options"):
                if getattr(self, option):
                    raise PahqError(
                        f"{option}: {getattr(self, option)!r} goes with prefilter; give one, such as eap-ig"
                    )
            return
        if self.keep is None and not self.order_by_score:
            raise PahqError("keep: prefilter needs the share of edges to keep; give one such as 0.2, or order_by_score")
        if self.keep is not None and not (isinstance(self.keep, int | float) and 0 < self.keep <= 1):
            raise PahqError(f"keep: {self.keep!r} is no share of the edges; give a number above 0 and up to 1")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> RunConfig:
        """The inverse of ``to_dict``; ``where`` names the file in the error of a damaged record."""
        names = {f.name for f in fields(cls)}
        if set(values) | set(ADDED) != names:
            odd = ", ".join(sorted((set(values) | set(ADDED)) ^ names))
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
        default = {f.name: {} if f.name.endswith("_options") else f.default for f in fields(self)}
        words = [f"{name}={value!r}" for name, value in given.items() if value != default[name]]
        return f"pahq.discover({', '.join(words + ([] if out is None else [f'out={out!r}']))})"
