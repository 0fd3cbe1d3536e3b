"""Precision policies on SmolLM2-135M: decisions, circuits, time and memory beside FP32's.

The table's columns, by policy (``exact``: decisions that low precision cannot bear are taken in FP32):

agree   share of decisions equal to FP32's. Two sweeps part after the first different decision, so every state of the
        policy's own sweep is evaluated in FP32 as well (Acdc's check), on the same base. Of exact decisions, those
        within FP32's own rounding noise of the threshold are counted apart; whole sweeps, nothing is sampled.
F1      of the kept edges against the FP32 circuit of the same threshold, prompts and seed.
AUC     of a sweep of thresholds against the FP32 circuit at the reference threshold: standard (trapezoids), and
        the ACDC paper's pessimistic one. FP32's own row says what these very thresholds allow: its circuits at others
        than the reference lack some of the reference's edges, too.
time    of a sweep, construction included, in a process of its own after the model is warm. Plain passes are timed in
        each of these, before and after its sweep; the median over the processes of a draw counts, since they differ.
weights on a device: low-precision copies, and buffers for the FP32 weights that stream; share of FP32's bytes.
peak    resident memory of that process (the model's FP32 weights, which are on the same host here, included).

Timings, F1 and AUC use --n prompts; agreement, whose sweeps are evaluated twice, uses --sweep-n, and so does all of
rtn, whose sweeps are long. Every sweep is a process of its own; one that fails is reported, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from common import finish, header, median, parser
from jobs import Answer, Runner
from pahq.errors import PahqError
from pahq.evaluation.roc import Point, auc, f1, pessimistic_auc, rates
from pahq.method.margin import NOISE
from sweeps import METRIC, ROWS, work

EXACT = tuple(row for row in ROWS if row.endswith("exact"))
REPEATED = ("fp32", "bf16 exact", "int8 exact")
"""Rows that are timed with every draw of prompts; the others with the first."""
SLOW = "rtn"
"""It rounds the metric, so that every state takes the whole vocabulary: timed on --sweep-n prompts, few thresholds.

Its effects are multiples of e4m3's steps, and so hardly depend on the threshold.
"""
PARTS = ("facts", "timings", "noise", "decisions", "auc", "rtn", "agreement")
"""What can be measured, in the order in which it is wanted if time is short."""
AUC_FIGURES = {"fp32": "auc_fp32", "pahq-values": "auc_values", "pahq": "auc_plain", "rtn": "auc_rtn"}
DECIDED = (0.01, 0.001)
"""Thresholds at which the targets ask for pahq's decisions."""
TARGETS: dict[str, tuple[str, float]] = {
    "agree_exact": (">=", 1.0),
    "agree_plain_0.01": (">=", 0.995),
    "agree_plain_0.001": (">=", 0.99),
    "escalated_0.01": ("<=", 0.03),
    "escalated_0.001": ("<=", 0.10),
    "auc_values": (">=", 0.96),
    "auc_plain": (">=", 0.99),
    "auc_rtn": ("<=", 0.6),
    "weight_ratio": ("<=", 0.45),
    "time_ratio": ("<=", 0.5),
    "pfe_mixed": ("<=", 0.012),
}


class TaskRun:
    """All that is measured on one task."""

    def __init__(self, runner: Runner, task: str) -> None:
        self.runner, self.task, self.given = runner, task, runner.given
        self.details: dict[str, Any] = {}
        self.figures: dict[str, float] = {}
        self.rows: dict[str, dict[str, float]] = {row: {} for row in ROWS}

    def run(self) -> None:
        print(f"\n{self.task}", flush=True)
        self.runner.start_task()
        others = [row for row in ROWS if row != "fp32"]
        parts: dict[str, Callable[[], None]] = {
            "facts": self._facts,
            "timings": self._timings,
            "noise": self._noise,
            "decisions": lambda: self._decisions(self.given.decided_by, self.given.decided),
            "auc": self._curves,
            "rtn": self._rtn,
            "agreement": lambda: self._decisions(others, [self.given.reference]),
            "full": lambda: self._decisions(others, self.given.decided),
        }
        for name, measure in parts.items():
            if name in self.given.parts:
                measure()
        self._agreement_figures()

    def sweep(self, row: str, threshold: float, n: int, check: bool = False) -> Answer | None:
        """A sweep over n prompts of the first draw."""
        return self.runner.ask(
            self.task,
            "sweep",
            row=row,
            threshold=threshold,
            n=n,
            seed=self.given.seed,
            check=check,
            plain=False,
        )

    def n_of(self, row: str) -> int:
        """Prompts of a row's sweeps that are not checked."""
        return self.given.sweep_n if row == SLOW else self.given.n

    def _facts(self) -> None:
        facts = self.runner.ask(self.task, "facts", n=self.given.sweep_n, seed=self.given.seed)
        if facts is None:
            return
        self.details |= {"facts": facts}
        scale = facts["corrupted_metric"]
        print(f"  thresholds are the papers' own, unscaled, since KL is in nats whatever the model. Here the corrupted "
              f"prompts' KL from the clean run is {scale:.3g}, of which 0.01 is {0.01 / scale:.1e} and 0.001 "
              f"{0.001 / scale:.1e}; the papers print no such figure for GPT-2 to compare with")  # fmt: skip
        for row, (policy, _) in ROWS.items():
            self.rows[row]["weights"] = sum(facts["weights"][policy].values())
            self.rows[row]["weight_ratio"] = self.rows[row]["weights"] / facts["fp32_bytes"]
        parts = ", ".join(f"{k} {v / facts['fp32_bytes']:.3f}" for k, v in facts["weights"]["pahq"].items())
        print(f"  pahq's weights on a device, as shares of FP32's {facts['fp32_bytes'] / 2**20:.0f} MiB: {parts}")
        self.figures["weight_ratio"] = self.rows["pahq"]["weight_ratio"]

    def _timings(self) -> None:
        """Interleaved sweeps at the reference threshold; another draw of prompts each round."""
        given, kept = self.given, dict[str, np.ndarray]()
        ratios: dict[str, list[float]] = {row: [] for row in REPEATED}
        pfe: dict[str, list[float]] = {row: [] for row in REPEATED}
        seconds: dict[str, list[float]] = {row: [] for row in ROWS}
        plains: list[list[float]] = []
        for repeat in range(given.repeats):
            spent, tests, plain = dict[str, float](), dict[str, int](), list[float]()
            for row in given.timed if repeat == 0 else [row for row in given.timed if row in REPEATED]:
                found = self.runner.ask(
                    self.task,
                    "sweep",
                    row=row,
                    threshold=given.reference,
                    n=given.n,
                    seed=given.seed + repeat,
                    check=False,
                    plain=row in REPEATED,
                )
                if found is None:
                    continue
                spent[row] = found["seconds"]
                seconds[row].append(found["seconds"])
                if row in REPEATED:
                    tests[row] = found["tests"]
                    plain.append(found["plain_s"])
                if repeat == 0:
                    kept[row] = np.array(found["kept"], dtype=np.int64)
                    self.rows[row] |= {"peak": found["peak_bytes"], "kept": len(found["kept"])}
            plains.append(plain)
            for row in tests:
                pfe[row].append(spent[row] / tests[row] / median(plain))
                if "fp32" in spent:
                    ratios[row].append(spent[row] / spent["fp32"])
        for row, times in seconds.items():
            if times:
                self.rows[row]["time"] = median(times)
            if row in kept and "fp32" in kept:
                self.rows[row]["f1"] = f1(_mask(kept[row], kept["fp32"]), _mask(kept["fp32"], kept[row]))
        self.details["timings"] = {"seconds": seconds, "ratios_to_fp32": ratios, "pfe": pfe, "plain_s": plains}
        middle = {row: median(ratios[row]) for row in EXACT if ratios.get(row)}
        if middle:
            fastest = min(middle, key=lambda row: middle[row])
            self.figures |= {"time_ratio": middle[fastest], "pfe_mixed": median(pfe[fastest])}
            self.details["fastest_exact"] = fastest
            print(f"  fastest exact policy: {fastest}, {middle[fastest]:.3f} of fp32's time, "
                  f"{self.figures['pfe_mixed']:.4f} plain passes a test (fp32 {median(pfe['fp32']):.4f})")  # fmt: skip

    def reference(self, row: str) -> Answer | None:
        """FP32's circuit on the prompts of a row's sweeps."""
        given, n = self.given, self.n_of(row)
        sample = given.sample if n == given.sweep_n else 0
        return self.runner.ask(self.task, "reference", threshold=given.reference, n=n, seed=given.seed, sample=sample)

    def _noise(self) -> None:
        """How far FP32 is from itself, on the prompts of the checked sweeps."""
        found = self.reference(SLOW)
        if found is None:
            return
        noise = found["noise"]
        largest = max(noise["largest"].values())
        self.details |= {"noise": noise, "fp32_noise": largest, "fp32_noise_share": noise["largest_share"]}
        print(f"  FP32's own noise: effects of {noise['sampled']} tests in other orders of summation differ by at most "
              + ", ".join(f"{value:.1e} ({pair})" for pair, value in noise["largest"].items())
              + f"; as a share of the metric (at least 1) by {noise['largest_share']:.1e}, where a decision counts as "
              f"within noise up to {NOISE:.0e}")  # fmt: skip

    def _decisions(self, rows: Iterable[str], thresholds: Iterable[float]) -> None:
        for threshold in thresholds:
            for row in rows:
                found = self.sweep(row, threshold, self.given.sweep_n, check=True)
                if found is not None:
                    check = found["check"]
                    apart = check["within_noise"] if row in EXACT else 0
                    share = 1 - (check["disagreements"] - apart) / max(1, check["checked"])
                    self.rows[row][f"agree_{threshold:g}"] = share
                    self.rows[row][f"escalated_{threshold:g}"] = found["precision"]["refined_share"]

    def _agreement_figures(self) -> None:
        for threshold in DECIDED:
            exact, plain = self.rows["pahq exact"], self.rows["pahq"]
            if f"agree_{threshold:g}" in plain:
                self.figures[f"agree_plain_{threshold:g}"] = plain[f"agree_{threshold:g}"]
            if f"escalated_{threshold:g}" in exact:
                self.figures[f"escalated_{threshold:g}"] = exact[f"escalated_{threshold:g}"]
        exact = [self.rows["pahq exact"].get(f"agree_{threshold:g}") for threshold in DECIDED]
        if None not in exact:
            self.figures["agree_exact"] = min(share for share in exact if share is not None)

    def _curves(self) -> None:
        """AUC of the rows asked for; thresholds from the highest, whose sweeps are the shortest."""
        given = self.given
        points: dict[str, dict[str, Point]] = {row: {} for row in given.auc}
        for threshold in given.thresholds:
            for row in given.auc:
                if row == SLOW and threshold not in (max(given.thresholds), given.reference):
                    continue
                reference = self.reference(row)
                if reference is None:
                    continue
                edges, wanted = (_places(reference[name], reference["places"]) for name in ("edges", "kept"))
                try:
                    rates(wanted, wanted, edges)
                except PahqError as error:
                    print(f"  no AUC: {error}")
                    return
                found = self.sweep(row, threshold, self.n_of(row))
                if found is not None:
                    kept = _places(found["kept"], reference["places"])
                    points[row][f"{threshold:g}"] = rates(kept, wanted, edges)
        self.details["roc"] = points
        for row, some in points.items():
            if some:
                self.rows[row] |= {"auc": auc(some.values()), "pessimistic_auc": pessimistic_auc(some.values())}
        for row, name in AUC_FIGURES.items():
            if "auc" in self.rows[row]:
                self.figures |= {name: self.rows[row]["auc"], f"{name}_pessimistic": self.rows[row]["pessimistic_auc"]}

    def _rtn(self) -> None:
        """Why rounding everything fails."""
        found, reference = self.sweep(SLOW, self.given.reference, self.given.sweep_n), self.reference(SLOW)
        if found is None:
            return
        additions = found["additions"]
        self.details["rtn"] = {"zero_effects": found["zero_effects"], **additions, "tests": found["tests"]}
        print(f"  rtn: {found['zero_effects']:.1%} of {found['tests']} effects are exactly zero; of "
              f"{additions['additions']} numbers added up in residual streams {additions['lost_share']:.1%} "
              "leave no trace")  # fmt: skip
        row = self.rows[SLOW]
        row |= {"time": found["seconds"], "peak": found["peak_bytes"], "kept": len(found["kept"])}
        if reference is not None:
            kept, wanted = (_places(one["kept"], reference["places"]) for one in (found, reference))
            row["f1"] = f1(kept, wanted)

    def table(self) -> None:
        given = self.given
        agree = [f"agree_{threshold:g}" for threshold in sorted({given.reference, *given.decided}, reverse=True)]
        columns = [(name, name.replace("_", " "), ".3%") for name in agree]
        columns += [("f1", "F1", ".3f"), ("auc", "AUC", ".3f"), ("pessimistic_auc", "pess. AUC", ".3f")]
        columns += [("time", "time s", ".1f"), ("weight_ratio", "weights", ".3f"), ("weights", "MiB", "MiB")]
        columns += [("peak", "peak MiB", "MiB"), ("kept", "kept", ".0f")]
        print(f"\n{self.task}, {METRIC}, resample; F1, time and peak at threshold {given.reference:g}, "
              f"{given.n} prompts (rtn: {given.sweep_n})")  # fmt: skip
        print(f"{'':12}" + "".join(f"{title:>12}" for _, title, _ in columns))
        for row, found in self.rows.items():
            cells = [_cell(found.get(name), form) for name, _, form in columns]
            print(f"{row:12}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def _counted(answer: Answer) -> Answer:
    """An answer with the number of its edges for their places."""
    return {key: len(value) if key in ("kept", "edges") else value for key, value in answer.items()}


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value / 2**20:.0f}" if form == "MiB" else f"{value:{form}}"


def _places(flat: Iterable[int], size: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[list(flat)] = True
    return mask


def _mask(flat: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Places as bool [largest place of both + 1]."""
    return _places(flat.tolist(), 1 + int(max([0, *flat.tolist(), *other.tolist()])))


def targets(figures: dict[str, float]) -> None:
    print("\ntargets (ioi)")
    for name, (sign, goal) in TARGETS.items():
        if name not in figures:
            print(f"  {name:20} not measured")
            continue
        met = figures[name] >= goal if sign == ">=" else figures[name] <= goal
        print(f"  {name:20} {figures[name]:.5g} {sign} {goal:g}: {'met' if met else 'NOT MET'}")


def options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--model", default="smollm2-135m", help="a name or path (default smollm2-135m)")
    made.add_argument("--tasks", default="ioi", help="names or files, with commas (default ioi; the figures are its)")
    made.add_argument("--n", type=int, default=16, help="prompts of timed sweeps (default 16)")
    made.add_argument("--sweep-n", type=int, default=4, help="prompts of agreement and of rtn (default 4)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--reference", type=float, default=0.05, help="threshold of the FP32 circuit (default 0.05)")
    made.add_argument("--thresholds", default="0.3,0.1,0.05,0.02,0.01", help="of the AUC's sweeps")
    made.add_argument("--auc", default="fp32,pahq,pahq-values,rtn", help="rows that get an AUC")
    timed = ",".join(row for row in ROWS if row != SLOW)
    made.add_argument("--timed", default=timed, help="rows that are timed (default: all but rtn)")
    made.add_argument("--decided", default=",".join(map(str, DECIDED)), help="thresholds of 'decisions'")
    made.add_argument("--decided-by", default="pahq exact,pahq", help="rows whose decisions they are")
    made.add_argument("--repeats", type=int, default=3, help="draws of prompts that are timed (default 3)")
    made.add_argument("--sample", type=int, default=60, help="tests on which FP32's noise is measured (default 60)")
    made.add_argument("--parts", default=",".join(PARTS), help="what to measure (default %(default)s)")
    made.add_argument(
        "--full", action="store_true", help="agreement of every row at the thresholds of --decided too (long)"
    )
    made.add_argument("--quick", action="store_true", help="4 prompts, one repeat, three thresholds")
    made.add_argument("--minutes", type=float, default=60.0, help="of each task, no sweep is begun later (default 60)")
    made.add_argument("--patience", type=float, default=30.0, help="minutes that one sweep may take (default 30)")
    made.add_argument("--resume", action="store_true", help="go on from what --out holds of a run cut short")
    made.add_argument("--in-process", action="store_true", help="no processes of their own: peaks mean nothing then")
    made.add_argument("--worker", help=argparse.SUPPRESS)
    given = made.parse_args()
    if given.quick:
        given.n, given.sweep_n, given.repeats, given.sample, given.thresholds = 8, 4, 1, 20, "0.3,0.1,0.05"
    for name in ("thresholds", "decided"):
        value = getattr(given, name)
        try:
            setattr(given, name, sorted({float(threshold) for threshold in value.split(",")}, reverse=True))
        except ValueError:
            made.error(f"--{name} '{value}': give numbers with commas, for example 0.1,0.05")
    given.parts = [*given.parts.split(","), *(["full"] if given.full else [])]
    for part in given.parts:
        if part not in (*PARTS, "full"):
            made.error(f"--parts '{part}' is no part of this benchmark; choose from {', '.join(PARTS)}")
    for name in ("auc", "timed", "decided_by"):
        setattr(given, name, getattr(given, name).split(","))
        for row in getattr(given, name):
            if row not in ROWS:
                option = name.replace("_", "-")
                made.error(f"--{option} '{row}' is no row of the table; choose from {', '.join(ROWS)}")
    return given


def main() -> None:
    given = options()
    if given.worker is not None:
        try:
            print(json.dumps(work(json.loads(given.worker))))
        except PahqError as error:
            sys.exit(f"error: {error}")
        return
    facts = header()
    runner, figures, details = Runner(given, facts), dict[str, float](), dict[str, Any]()
    runs = [TaskRun(runner, task) for task in given.tasks.split(",")]
    for index, run in enumerate(runs):
        run.run()
        suffix = "" if index == 0 else f"_{run.task}"
        figures |= {f"{name}{suffix}": value for name, value in run.figures.items()}
        details[run.task] = {"rows": run.rows, **run.details}
        run.table()
    details |= {"options": {k: str(v) for k, v in vars(given).items()}, "failures": runner.failures}
    details["sweeps"] = [{"job": json.loads(key), **_counted(answer)} for key, answer in runner.answers.items()]
    if runs[0].task == "ioi":
        targets(figures)
    if runner.failures:
        print(f"{len(runner.failures)} jobs failed or were left out: see above, and 'failures' in the details")
    finish(given.out, facts, figures, details)


if __name__ == "__main__":
    main()
