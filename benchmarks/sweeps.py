"""What benchmarks/precision.py does in processes of its own: sweeps under a policy, FP32's noise, sizes of weights.

A job is a dictionary of JSON values, and so is its answer; each job gets a fresh process, so that its peak memory is
its own and no job warms caches for another.
"""

from __future__ import annotations

import statistics
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from common import seconds
from pahq.engine.full import FullEvaluator
from pahq.engine.marks import Marks
from pahq.method.acdc import Acdc, AcdcOptions, AcdcResult
from pahq.method.sweep import Sweep, visits
from pahq.model import Transformer, load_model
from pahq.precision.formats import round_to
from pahq.precision.policy import POLICIES, Policy, get_policy
from pahq.precision.schedule import make_scheduler
from pahq.precision.size import head_bytes, weight_bytes
from pahq.precision.store import WeightStore
from pahq.precision.streamed import streamed
from pahq.precision.values import RoundedTransformer
from pahq.report.machine import peak_memory
from pahq.task import get_task
from pahq.task.metrics import LogitsReadout, get_metric
from pahq.task.prompts import Prompts
from pahq.task.score import read_logits

ROWS: dict[str, tuple[str, bool | None]] = {
    "fp32": ("fp32", None),
    "bf16": ("bf16", False),
    "pahq-values": ("pahq-values", None),
    "pahq": ("pahq", False),
    "pahq exact": ("pahq", True),
    "bf16 exact": ("bf16", True),
    "int8": ("int8", False),
    "int8 exact": ("int8", True),
    "rtn": ("rtn", None),
}
"""The table's rows: policy, and whether its decisions are to be FP32's (None: the policy has no choice)."""
METRIC = "kl_div"
CPU = torch.device("cpu")


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Answers one job; job["kind"] is ``facts``, ``sweep`` or ``reference``."""
    model = load_model(job["model"])
    if job["kind"] == "facts":
        return facts(model, job["task"], job["n"], job["seed"])
    prompts = get_task(job["task"]).prompts(model, job["n"], seed=job["seed"])
    if job["kind"] == "reference":
        return reference(model, prompts, job["threshold"], job["sample"])
    return sweep(model, prompts, job["row"], job["threshold"], job["check"], job["plain"])


def copies(model: Transformer, prompts: Prompts, policy: Policy) -> dict[str, int]:
    """Bytes of what a sweep keeps of the weights under a policy that quantises differences."""
    engine = Acdc(model, prompts, AcdcOptions(0.05, METRIC, policy=policy)).engine
    engine.store.make_all()
    screen = engine.vocabulary.screen
    if screen is None:
        engine.store.matrix("unembed")
    found = {"copies": sum(held.nbytes for held in engine.store.held())}
    if screen is not None and screen.low is not None:
        found["likely tokens"] = screen.columns.nbytes + screen.low.nbytes
    return found


def facts(model: Transformer, task: str, n: int, seed: int) -> dict[str, Any]:
    """The scale of the metric on n prompts, and the bytes of weights on a device under each policy.

    A device holds low-precision copies, the likely tokens' unembedding (in FP32, and low), and buffers through which
    FP32 weights stream: two layers and two pieces of the unembedding, as the streamed model really allocates them,
    and two heads under test.
    """
    prompts = get_task(task).prompts(model, n, seed=seed)
    clean = read_logits(model, prompts, "clean")
    scale = float(get_metric(METRIC, prompts, clean)(LogitsReadout(read_logits(model, prompts, "corrupt")))[0])
    fp32 = sum(held.nbytes for held in WeightStore(model, get_policy("fp32")).masters())
    with make_scheduler("cpu") as scheduler, torch.no_grad():
        moving = streamed(model, CPU, scheduler, copy=True)
        moving.unembed(moving.residual(prompts.clean[:1])[:, -1:])
        slots = {"layers": moving.blocks.loader.device_bytes, "unembedding": moving.slabs.loader.device_bytes}  # pyright: ignore[reportAttributeAccessIssue]  (a StreamedTransformer's blocks are StreamedBlocks)
    heads = 2 * head_bytes(model, {(0, 0)})
    weights = {}
    for name in dict.fromkeys(policy for policy, _ in ROWS.values()):
        policy = POLICIES[name][0]
        parts = {"copies": fp32 if policy.is_fp32 else sum(weight_bytes(model, policy).values())}
        if policy.differences:
            parts = {**copies(model, prompts, policy), **slots}
        if policy.under_test != "none":
            parts["heads"] = heads
        weights[name] = parts
    return {"corrupted_metric": scale, "fp32_bytes": fp32, "weights": weights}


def sweep(model: Transformer, prompts: Prompts, row: str, threshold: float, check: bool, plain: bool) -> dict[str, Any]:
    """One timed sweep under a row of the table, its construction (clean and corrupted runs, copies) included.

    plain: time plain passes before and after it, as benchmarks/engine.py does. kept: flat places in the mask.
    Peak memory is read before anything but the sweep took memory.
    """
    policy, exact = ROWS[row]
    options = AcdcOptions(threshold, METRIC, policy=get_policy(policy), exact=exact)

    def bare() -> Tensor:
        return model.unembed(model.residual(prompts.clean)[:, -1])

    bare()  # the first pass reads the weights from disk
    before = [seconds(bare) for _ in range(5)] if plain else []
    start_bytes = peak_memory(CPU)["host_bytes"]
    found: list[AcdcResult] = []
    additions = Additions()
    with patch.object(RoundedTransformer, "add", additions.add):
        spent = seconds(lambda: found.append(Acdc(model, prompts, options, check=check).run()))
    answer = {"seconds": spent, "start_bytes": start_bytes, "peak_bytes": peak_memory(CPU)["host_bytes"]}
    result = found[0]
    effects = np.array([decision.effect for decision in result.decisions])
    precision = dict(result.stats["precision"])
    checked = precision.pop("check", None)
    if checked is not None:
        checked |= {"disagreements": len(checked["disagreements"]), "examples": checked["disagreements"][:20]}
    answer |= {
        "tests": len(effects),
        "kept": np.flatnonzero(result.mask).tolist(),
        "metric": result.metric,
        "zero_effects": float((effects == 0).mean()),
        "precision": precision,
        "check": checked,
        **{key: result.stats[key] for key in ("states", "wasted", "batches", "escalated", "flops")},
    }
    if get_policy(policy).values:
        answer["additions"] = additions.figures()
    if plain:
        answer["plain_s"] = plain_pass(model, prompts, before)
    return answer


def plain_pass(model: Transformer, prompts: Prompts, before: list[float]) -> float:
    """Seconds of the faster plain pass, our own (timed before as well) or transformers'; medians."""
    from engine import plain_passes  # here, since transformers takes memory and time to import

    times: dict[str, list[float]] = {"bare torch": list(before), "transformers": []}
    passes = plain_passes(model, prompts)
    for call in passes.values():
        seconds(call)
    for _ in range(5):
        for which, call in passes.items():
            times[which].append(seconds(call))
    return min(statistics.median(values) for values in times.values())


class Additions:
    """Counts what residual additions lose under a policy that rounds them: addends that leave no trace at all."""

    def __init__(self) -> None:
        self.count = self.lost = 0

    @property
    def add(self) -> Any:
        """What takes the place of ``RoundedTransformer.add``."""

        def add(model: RoundedTransformer, x: Tensor, y: Tensor) -> Tensor:
            total = round_to(x + y, model.policy.format("residual"))
            addends = (y != 0).expand(total.shape)
            self.count += int(addends.sum())
            self.lost += int(((total == x) & addends).sum())
            return total

        return add

    def figures(self) -> dict[str, float]:
        return {"additions": self.count, "lost": self.lost, "lost_share": self.lost / max(1, self.count)}


def reference(model: Transformer, prompts: Prompts, threshold: float, sample: int) -> dict[str, Any]:
    """The FP32 circuit (no screening of the vocabulary), and how far FP32 is from itself in other orders of summation.

    Effects of a sample of its tests (none for 0), half of them those nearest the threshold, the others spread, three
    times: by the engine (sums of differences, many states at once); by whole passes over all prompts; by whole
    passes over one prompt at a time, in which the products are blocked otherwise.
    """
    acdc = Acdc(model, prompts, AcdcOptions(threshold, METRIC), screen=False)
    result = acdc.run()
    answer = {
        "kept": np.flatnonzero(result.mask).tolist(),
        "edges": np.flatnonzero(result.graph.edges).tolist(),
        "places": int(result.mask.size),
        "tests": len(result.decisions),
        "metric": result.metric,
    }
    return answer | ({"noise": noise(model, prompts, result, threshold, sample)} if sample else {})


def noise(model: Transformer, prompts: Prompts, result: AcdcResult, threshold: float, sample: int) -> dict[str, Any]:
    """See ``reference``."""
    effects = np.array([decision.effect for decision in result.decisions])
    nearest = np.argsort(np.abs(effects - threshold), kind="stable")[: sample // 2]
    spread = np.linspace(0, len(effects) - 1, max(1, sample - sample // 2)).astype(int)
    chosen = set(nearest.tolist()) | set(spread.tolist())
    whole, single = Passes(model, prompts, result, len(prompts)), Passes(model, prompts, result, 1)
    sweep = Sweep(visits(result.graph), Marks.full(result.graph))
    shares: list[float] = []  # of the metric's size, as the margin of decisions counts noise
    gaps: dict[str, list[float]] = {"engine, whole passes": [], "whole passes, one prompt at a time": []}
    for decision in result.decisions:
        sweep.peek()
        if decision.order in chosen:
            finished = sweep.marks.finished.copy()
            finished[decision.row] = True
            masks = sweep.marks.mask.copy(), sweep.marks.mask.copy()
            masks[1][decision.row, decision.column] = False
            # once finished, a receiver reads the same values as before: its present edges' senders
            both = [passes.metric(masks[1], finished) - passes.metric(masks[0], finished) for passes in (whole, single)]
            gaps["engine, whole passes"].append(abs(decision.effect - both[0]))
            gaps["whole passes, one prompt at a time"].append(abs(both[0] - both[1]))
            shares.append(max(values[-1] for values in gaps.values()) / max(1.0, abs(decision.before)))
        sweep.decide(decision.kept)
    return {
        "sampled": len(chosen),
        "largest": {pair: max(values) for pair, values in gaps.items()},
        "largest_share": max(shares),
        "median": {pair: statistics.median(values) for pair, values in gaps.items()},
    }


class Passes:
    """The metric of edge sets by whole passes over ``size`` prompts at a time."""

    def __init__(self, model: Transformer, prompts: Prompts, result: AcdcResult, size: int) -> None:
        parts = [prompts[first : first + size] for first in range(0, len(prompts), size)]
        self.evaluators = [FullEvaluator(model, part, result.graph) for part in parts]
        self.measure = get_metric(METRIC, prompts, read_logits(model, prompts, "clean", size))

    def metric(self, mask: np.ndarray, visited: np.ndarray) -> float:
        logits = torch.cat([evaluator.logits(mask, visited) for evaluator in self.evaluators])
        return float(self.measure(LogitsReadout(logits))[0])
