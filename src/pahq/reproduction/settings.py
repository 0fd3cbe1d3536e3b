"""The models and prompts of the published comparison, and the stand-ins that are here without a hub."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pahq.errors import PahqError
from pahq.evaluation.truth.base import load_truth, truth_names
from pahq.reproduction.cells import Setting, on_truth
from pahq.reproduction.paper import PAHQ_THRESHOLDS, acdc_thresholds

if TYPE_CHECKING:
    from pahq.model import Transformer

TASKS = ("docstring", "greaterthan", "ioi")
KINDS = ("kl", "task")
GPT2, SMOLLM2, ATTN_ONLY = "gpt2", "smollm2-135m", "object:attn-only-4l"
_PAPER = {"ioi": (GPT2, "ioi-gpt2", "logit_diff", 50), "greaterthan": (GPT2, "greaterthan-gpt2", "greaterthan", 100)}
_PAPER["docstring"] = (ATTN_ONLY, "docstring-attn-only-4l", "docstring", 50)


@dataclass(frozen=True)
class GridOptions:
    """What all tables share.

    offline: take the stand-ins. quick: a small grid. n, seed: prompts, None: as many as the paper, or the stand-in.
    tasks: those of the paper; truths: with offline, known circuits with a model (None: all trained ones).
    kinds: of metric, ``kl`` and ``task``. methods: rows, None: the paper's. thresholds: ``pahq`` (Wang et al.'s three),
    ``acdc`` (Conmy et al.'s 21 or 31), or numbers. model, task: of a table about one model alone, in place of its own.
    steps: of trained masks, None: the methods' own. Raises PahqError for a value that cannot be.
    """

    offline: bool = False
    quick: bool = False
    n: int | None = None
    seed: int = 0
    tasks: tuple[str, ...] = TASKS
    truths: tuple[str, ...] | None = None
    kinds: tuple[str, ...] = KINDS
    methods: tuple[str, ...] | None = None
    thresholds: str | None = None
    model: str | None = None
    task: str | None = None
    steps: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, given, known in (("tasks", self.tasks, TASKS), ("metrics", self.kinds, KINDS)):
            for one in given:
                if one not in known:
                    raise PahqError(f"{name}: '{one}' is unknown; known: {', '.join(known)}")
        if self.truths is not None and not self.offline:
            raise PahqError(f"truths: '{','.join(self.truths)}' goes with offline; add --offline, or give tasks")
        if self.n is not None and self.n < 1:
            raise PahqError(f"n: {self.n} prompts are too few; give at least 1")
        self.sweep("ioi", "kl", PAHQ_THRESHOLDS)

    def sweep(self, task: str, kind: str, default: Sequence[float]) -> tuple[float, ...]:
        """The thresholds for a task and a kind of metric; raises PahqError for what is none."""
        if self.thresholds is None:
            return tuple(default)
        if self.thresholds == "pahq":
            return PAHQ_THRESHOLDS
        if self.thresholds == "acdc":
            return acdc_thresholds(task, kind)
        found = []
        for word in self.thresholds.split(","):
            try:
                found.append(float(word))
            except ValueError:
                found.append(math.nan)
            if not 0 <= found[-1] < math.inf:
                raise PahqError(f"thresholds: '{word}' is no threshold; give pahq, acdc, or numbers such as 0.1,0.01")
        return tuple(dict.fromkeys(found))

    @property
    def method_options(self) -> dict[str, dict[str, Any]]:
        """row -> options of its method."""
        steps = 20 if self.steps is None and self.quick else self.steps
        return {} if steps is None else {name: {"steps": steps} for name in ("subnetwork-probing", "edge-pruning")}

    def settings(self) -> list[Setting]:
        """The models whose circuit is known; raises PahqError where a stand-in cannot be had."""
        if not self.offline:
            tasks = ("ioi",) if self.quick and self.tasks == TASKS else self.tasks
            return [self.published(task) for task in tasks]
        names = self.truths
        if names is None:
            trained = [name for name in truth_names() if name.startswith("trained-")]
            names = tuple(trained[:1] if self.quick else trained)
        return [self._stand_in(name) for name in names]

    def published(self, task: str) -> Setting:
        """The paper's model and prompts of one task."""
        model, truth, metric, n = _PAPER[task]
        common = {"n": self._count(n), "seed": self.seed, "device": self.device}
        metrics = {"kl": "kl_div", "task": metric}
        if task != "docstring":
            return Setting(task, model, task, truth, metrics, common)
        common["task_options"] = {"leading": 2}  # as the paper's prompts have it
        return Setting(task, model, task, truth, metrics, common, attn_only_4l)

    def single(self) -> Setting:
        """The one model that times are about: GPT-2 small on ioi, or the embedded model with few prompts."""
        model = self.model or (SMOLLM2 if self.offline else GPT2)
        task = self.task or "ioi"
        n = self._count(4 if self.offline else _PAPER["ioi"][3])
        truth = "ioi-gpt2" if (model, task) == (GPT2, "ioi") else None
        common = {"n": n, "seed": self.seed, "device": self.device}
        return Setting("single", model, task, truth, {"kl": "kl_div"}, common)

    def _stand_in(self, name: str) -> Setting:
        most = 8 if self.n is None and self.quick else self.n
        metrics = {"kl": "kl_div", "task": "logit_diff"}
        if (own := load_truth(name).metric) != "kl_div":  # a compiled program's own
            metrics = {"task": own}
        return on_truth(name, metrics, most, seed=self.seed, device=self.device)

    def _count(self, own: int) -> int:
        if self.n is not None:
            return self.n
        return min(own, 8) if self.quick else own


def attn_only_4l() -> Transformer:
    """The model of the docstring circuit; its weights come by TransformerLens. Raises PahqError without it."""
    from pahq.model import load_model

    try:
        return load_model("attn-only-4l")
    except PahqError as error:
        raise PahqError(f"{error}, leave docstring out of tasks, or take --offline") from None
