"""Faithfulness against size: ACDC, PAHQ, EAP, EAP-IG and edge pruning on behaviours of SmolLM2-135M, in one plot.

Every search is an ordinary run in the folder --runs, in a process of its own, so that its time and peak memory are its
own. ACDC and PAHQ give a circuit for each of --thresholds; a method that scores edges is one run, from which the best
--sizes edges are taken. All circuits are measured on held-out prompts: the share of the task's own metric that is
recovered, (m(circuit) - m(empty)) / (m(full) - m(empty)).

Figures: ``faithfulness_TASK_METHOD_SIZE`` (SIZE: edges asked for; of a sweep, edges kept), ``seconds_TASK_METHOD`` and
``mib_TASK_METHOD`` (all runs of the method together; the largest peak).

It can be done in pieces: --minutes M starts nothing new after M minutes, --resume goes on with the folder.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from common import finish, header, parser
from pahq.errors import PahqError
from pahq.evaluation import faithfulness
from pahq.evaluation.examples import Examples
from pahq.files import read_json, write_atomic, write_json
from pahq.model import Transformer, load_model
from pahq.report.console import make_console
from pahq.report.figures import chart
from pahq.report.figures.style import looks, plain_ticks
from pahq.report.finished import FinishedRun
from pahq.report.progress import Watch, watch_for
from pahq.report.tables import Column, Row, decimals, mebibytes, number, screen
from pahq.reproduction.auc import SWEEPS, cells_of, check_rows
from pahq.reproduction.cells import RUNS, Cell, Grid, Setting
from pahq.task import get_task

TASKS = "ioi,greaterthan,capital,agreement"
METHODS = "acdc,pahq,eap,eap-ig,edge-pruning"
THRESHOLDS = "0.3,0.1;greaterthan=0.1,0.03,0.01"
"""Logits, and for greaterthan shares of probability."""
LOWEST, HIGHEST = -0.3, 2.0
"""Of the plot: masks trained for a metric alone go far beyond the full model."""
TRAINED = ("subnetwork-probing", "edge-pruning")
COLUMNS = [
    Column("task", "task", left=True),
    Column("method", "method", left=True),
    Column("asked", "threshold or edges asked", left=True),
    Column("edges", "edges"),
    Column("recovered", "recovered", decimals(3)),
    Column("kl", "KL", number(3)),
    Column("accuracy", "accuracy", decimals(2)),
]


def options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--model", default="smollm2-135m")
    made.add_argument("--tasks", default=TASKS, help="(default %(default)s)")
    made.add_argument("--methods", default=METHODS, help="(default %(default)s)")
    made.add_argument("--n", type=int, default=8, help="prompts, and as many held out (default %(default)s)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--metric", default="task", help="of the searches; task: each task's own (default %(default)s)")
    made.add_argument(
        "--thresholds",
        default=THRESHOLDS,
        help="of the sweeps, in the metric's unit; after ';' those of a task of its own (default %(default)s)",
    )
    made.add_argument("--sizes", default="50,100,200,500,1000,2000,5000", help="edges (default %(default)s)")
    made.add_argument(
        "--ranking",
        choices=("signed", "absolute"),
        default="absolute",
        help="how scores rank edges (default %(default)s)",
    )
    made.add_argument("--steps", type=int, help="of trained masks (default: the method's own)")
    made.add_argument("--runs", type=Path, default=Path("runs/curves"), help="folder of the runs (%(default)s)")
    made.add_argument("--resume", action="store_true", help="go on with the runs in that folder")
    made.add_argument("--minutes", type=float, default=float("inf"), help="start nothing new after so many")
    made.add_argument("--one-process", action="store_true", help="all runs in this process: peak memory adds up")
    made.add_argument("--plot", type=Path, help="PNG of the curves")
    made.add_argument("--verbose", action="store_true", help="tell which run is at work")
    given = made.parse_args()
    given.tasks, given.methods = given.tasks.split(","), given.methods.split(",")
    try:
        check_rows(given.methods)
        given.thresholds = thresholds_of(given.thresholds)
        given.sizes = [int(word) for word in given.sizes.split(",")]
        if "" not in given.thresholds:
            raise ValueError("thresholds: none for tasks that have none of their own; begin with them, as in 0.3,0.1")
    except (PahqError, ValueError) as error:
        made.error(str(error))
    if (given.runs / RUNS).exists() and not given.resume:
        made.error(f"{given.runs} holds runs; say --resume to go on with them, or choose another folder")
    if given.plot is not None and not given.plot.parent.is_dir():
        made.error(f"{given.plot.parent}: there is no such folder")
    return given


def thresholds_of(text: str) -> dict[str, list[float]]:
    """``0.3,0.1;TASK=0.03``: task -> its thresholds, "" for all others. Raises ValueError for what is no number."""
    parts = [part.rpartition("=") for part in text.split(";")]
    return {task: [float(word) for word in words.split(",")] for task, _, words in parts}


class Bench:
    """The curves of one task. The model is loaded when something has to be measured."""

    def __init__(self, given: argparse.Namespace, grid: Grid, task: str, until: float) -> None:
        self.given, self.grid, self.until = given, grid, until
        common = {"n": given.n, "seed": given.seed}
        self.task = get_task(task)
        self.metric = self.task.default_metric if given.metric == "task" else given.metric
        self.setting = Setting(Path(task).stem, given.model, task, None, {"task": self.metric}, common)
        self._examples: Examples | None = None

    def cells(self, method: str) -> list[Cell]:
        steps = {} if self.given.steps is None else {key: {"steps": self.given.steps} for key in TRAINED}
        thresholds = self.given.thresholds.get(self.setting.name, self.given.thresholds[""])
        return cells_of(self.setting, method, self.metric, thresholds, steps)

    def points(self, model: Any, method: str) -> tuple[list[Row], Row | None]:
        """A row for each circuit, and what finding them took; what is not done in time is left out."""
        rows, runs = list[Row](), list[FinishedRun]()
        for cell in self.cells(method):
            done = (self.grid.out / RUNS / cell.name / "run.json").exists()
            if not done and time.monotonic() > self.until:
                self.grid.failures[cell.name] = f"left out: the {self.given.minutes:g} minutes are over"
                continue
            for run in self.grid.run([cell]).values():
                runs.append(run)
                rows += self._measured(model, cell, run)
        if not runs:
            return [], None
        peaks = [run.cost["host_bytes"] for run in runs]
        spent = {"seconds": sum(run.cost["seconds"] for run in runs), "bytes": max(peaks), "runs": len(runs)}
        return rows, {"task": self.setting.name, "method": method, **spent}

    def _measured(self, model: Any, cell: Cell, run: FinishedRun) -> list[Row]:
        """The circuits of a run on held-out prompts; kept beside the runs, so that they are measured once."""
        sweep = cell.row in SWEEPS
        how = {"ranking": self.given.ranking, "sizes": None if sweep else self.given.sizes, "seed": run.config.seed}
        file = self.grid.out / "points" / f"{cell.name}.json"
        if file.exists() and (kept := read_json(file)).get("how") == how:
            return kept["points"]
        graph, examples = run.circuit.graph, self._held_out(model(), run)
        if sweep:
            masks = [(run.circuit.n_edges, run.circuit.mask)]
        else:
            sizes = [size for size in self.given.sizes if size <= graph.n_edges]
            absolute = self.given.ranking == "absolute"
            masks = faithfulness.series(graph, run.circuit.effects, sizes, absolute=absolute)
        found = []
        for point in faithfulness.curve(examples, masks):
            asked = f"threshold {run.config.threshold:g}" if sweep else f"{point['asked']} edges"
            about = {"task": self.setting.name, "method": cell.row, "asked": asked, "size": point["asked"]}
            found.append(about | {key: point[key] for key in ("edges", "recovered", "kl", "accuracy", "metric")})
            print(f"  {self.setting.name} {cell.row} {asked}: {point['edges']} edges, {found[-1]['recovered']:.3f} "
                  "recovered", flush=True)  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"how": how, "points": found})
        return found

    def _held_out(self, model: Transformer, run: FinishedRun) -> Examples:
        if self._examples is None:
            prompts = self.task.prompts(model, run.config.n, run.config.seed, "test")
            metric, ablation = self.task.default_metric, run.config.ablation
            self._examples = Examples(model, prompts, run.circuit.graph, self.task, metric, ablation)
        return self._examples


def draw(figure: Any, rows: list[Row], costs: list[Row]) -> None:
    """A panel for each task, a line for each method; time and memory stand beside its name."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    across = min(2, len(tasks))
    down = -(-len(tasks) // across)
    figure.set_size_inches(5.0 * across, 3.6 * down)
    panels = figure.subplots(down, across, squeeze=False)
    shapes = looks(methods)
    for axes, task in zip(panels.flat, tasks, strict=False):
        for method in methods:
            mine = sorted((r["edges"], r["recovered"]) for r in rows if (r["task"], r["method"]) == (task, method))
            cost = [c for c in costs if (c["task"], c["method"]) == (task, method)]
            if not mine:
                continue
            label = f"{method}: {cost[0]['seconds']:.0f} s, {cost[0]['bytes'] / 2**30:.1f} GiB"
            look = shapes[method]
            line = ":" if method == "pahq" else look.line  # it lies upon acdc's where their circuits are the same
            axes.plot(*zip(*mine, strict=True), marker=look.mark, color=look.colour, linestyle=line, label=label)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xscale="log", title=task, ylim=(LOWEST, HIGHEST))
        plain_ticks(axes.xaxis)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", loc="upper left")
    for axes in panels.flat[len(tasks) :]:
        axes.set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("edges")
    for axes in panels[:, 0]:
        axes.set_ylabel("metric recovered, held out")


def main() -> None:
    given, facts = options(), header()
    grid = Grid(given.runs, watch_for() if given.verbose else Watch(), separate=not given.one_process)
    until = time.monotonic() + 60 * given.minutes
    loaded: list[Transformer] = []

    def model() -> Transformer:
        if not loaded:
            loaded.append(load_model(given.model))
        return loaded[0]

    rows, costs = list[Row](), list[Row]()
    for task in given.tasks:
        bench = Bench(given, grid, task, until)
        for method in given.methods:
            some, cost = bench.points(model, method)
            rows += some
            costs += [] if cost is None else [cost]
    make_console().print(screen(rows, COLUMNS))
    for cost in costs:
        print(f"  {cost['task']} {cost['method']}: {cost['seconds']:.1f} s in {cost['runs']} runs, peak "
              f"{mebibytes(cost['bytes'])} MiB")  # fmt: skip
    for cell, reason in grid.failures.items():
        print(f"failed: {cell}: {reason}")
    figures: dict[str, float] = {
        f"faithfulness_{row['task']}_{row['method'].replace('-', '_')}_{row['size']}": row["recovered"]
        for row in rows
        if row["recovered"] is not None
    }
    for cost in costs:
        name = f"{cost['task']}_{cost['method'].replace('-', '_')}"
        figures |= {f"seconds_{name}": cost["seconds"], f"mib_{name}": cost["bytes"] / 2**20}
    shown = [row for row in rows if row["recovered"] is not None and row["edges"]]
    if given.plot is not None and shown:
        image = chart.draw(lambda figure, of: draw(figure, list(of), costs), shown)
        if image is None:
            print(chart.MISSING)
        else:
            write_atomic(given.plot, image)
    details = {"options": {k: str(v) for k, v in vars(given).items()}, "points": rows, "costs": costs}
    finish(given.out, facts, figures, details | {"failures": grid.failures})


if __name__ == "__main__":
    main()
