"""``pahq evaluate`` and ``pahq compare``: how good finished runs are, alone and side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pahq.cli.config_file import Config
from pahq.cli.output import Json, Quiet, tell
from pahq.cli.running import guarded
from pahq.cli.tracking import tracked

if TYPE_CHECKING:
    from collections.abc import Callable

    from pahq.report.tracking.settings import Tracking

Runs = Annotated[list[str], typer.Argument(help="Folders of finished runs.", metavar="RUN")]
Truth = Annotated[
    str | None, typer.Option(help="A known circuit (see 'pahq truth') or a .json file of edges: ROC and F1 against it.")
]
Split = Annotated[str, typer.Option(help="Examples to evaluate on: test (held out), validation, train or all.")]
Number = Annotated[int | None, typer.Option("--n", "-n", help="Number of examples (default: as many as the run used).")]
Metric = Annotated[str | None, typer.Option(help="What is to be recovered (default: the run's own metric).")]
Select = Annotated[str, typer.Option(help="Circuits of each size from scores: top or greedy.")]
Ranking = Annotated[str, typer.Option(help="Rank edges for ROC by absolute or signed scores.")]
Resamples = Annotated[int, typer.Option("--bootstrap", help="Resamples for confidence intervals (0: none).")]
Level = Annotated[float, typer.Option(help="Level of confidence intervals.")]
Seed = Annotated[int, typer.Option(help="Seed of resamples, knock-outs and random circuits.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, … (default: the run's).")]
Out = Annotated[str | None, typer.Option(help="Folder for JSON, CSV and plots (default: none is written).")]


@tracked
def evaluate(
    runs: Runs,
    truth: Truth = None,
    against: Annotated[
        str | None, typer.Option(help="Folder of another run or circuit: agreement with it, ROC and F1 against it.")
    ] = None,
    split: Split = "test",
    n: Number = None,
    metric: Metric = None,
    select: Select = "top",
    ranking: Ranking = "absolute",
    knockouts: Annotated[int, typer.Option(help="Random knock-outs for completeness (0: none).")] = 10,
    removals: Annotated[int, typer.Option(help="Parts removed one by one for minimality, at most (0: none).")] = 50,
    unit: Annotated[str, typer.Option(help="What is knocked out and removed: node or edge.")] = "node",
    random_circuits: Annotated[int, typer.Option(help="Random circuits of equal size (0: none).")] = 5,
    bootstrap: Resamples = 1000,
    level: Level = 0.95,
    seed: Seed = 0,
    device: Device = None,
    out: Out = None,
    tracking: Tracking | None = None,
    quiet: Quiet = False,
    as_json: Json = False,
    config_file: Config = None,
) -> None:
    """How good finished runs are, on held-out examples.

    Faithfulness, ROC, CPR and CMD, completeness, minimality and a random baseline. With --out the same command goes
    on after a kill.
    """
    options = _options(locals())
    from pahq import assessment

    _finish(lambda how: assessment.evaluate(runs, out, **how, **options), "evaluation", out, quiet, as_json)


@tracked
def compare(
    runs: Runs,
    truth: Truth = None,
    split: Split = "test",
    n: Number = None,
    metric: Metric = None,
    select: Select = "top",
    ranking: Ranking = "absolute",
    bootstrap: Resamples = 1000,
    level: Level = 0.95,
    seed: Seed = 0,
    device: Device = None,
    out: Out = None,
    tracking: Tracking | None = None,
    quiet: Quiet = False,
    as_json: Json = False,
    config_file: Config = None,
) -> None:
    """Finished runs side by side, the best first.

    AUC, faithfulness, size, time, memory, states. With --out the same command goes on after a kill.
    """
    options = _options(locals())
    from pahq import assessment

    _finish(lambda how: assessment.compare(runs, out, **how, **options), "comparison", out, quiet, as_json)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in given.items() if name not in ("runs", "out", "quiet", "as_json", "config_file")
    }


def _finish(
    run: Callable[[dict[str, Any]], dict[str, Any]], kind: str, out: str | None, quiet: bool, as_json: bool
) -> None:
    """Runs, prints and names the folder."""
    from pahq.report import evaluation, results

    def left() -> str:
        there = out is not None and results.passes_path(out, kind).exists()
        return f"the same command goes on with what is in {out}" if there else "nothing was written"

    record = guarded(run, quiet, left)
    tell(record, lambda console: evaluation.show(record, kind, console), quiet=quiet, as_json=as_json, written=out)
