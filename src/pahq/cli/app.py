"""The command line. Torch is imported only by the commands that compute, so that help comes at once."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pahq.cli import codes
from pahq.cli.config_file import Config
from pahq.cli.options import method_options, task_options
from pahq.cli.output import Json, Manner, Quiet, fail, failed, mute, tell
from pahq.cli.running import Interrupted, guarded
from pahq.cli.tracking import tracked
from pahq.errors import PahqError
from pahq.files import explain, read_json
from pahq.report.config import CHOICES, RunConfig
from pahq.report.console import watched

if TYPE_CHECKING:
    from collections.abc import Callable

    from pahq.api import Outcome
    from pahq.evaluation.circuit import Circuit
    from pahq.report.tracking.settings import Tracking

app = typer.Typer(
    name="pahq",
    help="Find circuits in language models, fast and faithfully.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_ClickException = typer.BadParameter.__mro__[2]  # typer has no public name for the class of all usage errors


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"pahq {version('pahq')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def _choice(option: str) -> str:
    return " or ".join(CHOICES[option])


Streams = Annotated[
    str | None, typer.Option(help="Streams to use: load,low,high (default: all), some of them, or none.")
]
Trace = Annotated[str | None, typer.Option(help="File for a trace of the streams, in Chrome's format.")]
View = Annotated[bool, typer.Option("--view/--no-view", help="Leave viewer.html in the folder (see 'pahq view').")]


@app.command()
@tracked
def discover(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="smollm2-135m, a hub id, a folder, a .gguf file, or a known circuit's name.")
    ],
    task: Annotated[
        str, typer.Option(help="A task's name (see 'pahq tasks'), a JSONL or CSV file, or a known circuit's name.")
    ],
    threshold: Annotated[
        float | None,
        typer.Option(help="An edge goes if cutting it raises the metric (by its score) by less than this."),
    ] = None,
    method: Annotated[str, typer.Option(help=f"{_choice('method')} (see 'pahq methods').")] = "acdc",
    method_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the method, such as steps=10; repeat for more."),
    ] = None,
    edges: Annotated[int | None, typer.Option(help="Edges to keep, instead of a threshold (not acdc).")] = None,
    select: Annotated[
        str | None, typer.Option(help=f"How scores choose edges: {_choice('select')} (default: top with --edges).")
    ] = None,
    prefilter: Annotated[str | None, typer.Option(help="For acdc: a method whose scores thin the edges first.")] = None,
    keep: Annotated[float | None, typer.Option(help="For --prefilter: share of the edges left to sweep.")] = None,
    order_by_score: Annotated[
        bool, typer.Option("--order-by-score", help="For --prefilter: test senders from the least score up.")
    ] = False,
    metric: Annotated[str | None, typer.Option(help="kl_div, logit_diff, … (default: the task's own).")] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Folder of the run (default: runs/MODEL-TASK-[METHOD-]METRIC-THRESHOLD[-POLICY])."),
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Number of prompts.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed that draws the prompts.")] = 0,
    ablation: Annotated[str, typer.Option(help=_choice("ablation"))] = "resample",
    absolute: Annotated[
        bool | None,
        typer.Option(
            "--absolute/--signed", help="Go by |effect|, |score| (default: eap, eap-ig, exact) or signed ones."
        ),
    ] = None,
    head_order: Annotated[str, typer.Option(help=f"Heads as senders: {_choice('head_order')}.")] = "descending",
    sender_order: Annotated[str, typer.Option(help=f"Senders tested first: {_choice('sender_order')}.")] = "latest",
    split_qkv: Annotated[bool, typer.Option(help="Separate inputs for query, key and value.")] = True,
    direct_edges: Annotated[bool, typer.Option(help="Test direct edges (input to computed q, k, v).")] = True,
    split_pos: Annotated[bool, typer.Option(help="Position embedding as its own sender.")] = False,
    fold_ln: Annotated[bool, typer.Option(help="Fold layer norm into the weights that follow.")] = False,
    center_writing: Annotated[bool, typer.Option(help="Centre the weights that write to the residual.")] = False,
    center_unembed: Annotated[bool, typer.Option(help="Centre the unembedding over the vocabulary.")] = False,
    fold_value_biases: Annotated[bool, typer.Option(help="Fold value biases into the output bias.")] = False,
    pad: Annotated[bool, typer.Option(help="Pad prompts of unequal length (prompt files).")] = False,
    task_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the task, such as templates=8; repeat for more."),
    ] = None,
    full_vocabulary: Annotated[
        bool, typer.Option("--full-vocabulary", help="Sum over the whole vocabulary for every state (slower).")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    dtype: Annotated[str, typer.Option(help=_choice("dtype"))] = "float32",
    policy: Annotated[
        str, typer.Option(help="Precision: fp32, bf16, int8, pahq, …, a table such as attention=e4m3, or a .json file.")
    ] = "fp32",
    under_test: Annotated[
        str | None, typer.Option(help=f"Heads under test in FP32: {_choice('under_test')} (default: the policy's).")
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option("--exact/--no-exact", help="Decide as FP32 would (default: where the policy allows it)."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Decide all in FP32 too; report disagreements.")] = False,
    streams: Streams = None,
    trace: Trace = None,
    view: View = True,
    tracking: Tracking | None = None,
    quiet: Quiet = False,
    as_json: Json = False,
    config_file: Config = None,
) -> None:
    """Find a circuit. The same command goes on with a run that was cut short."""
    options = {name: value for name, value in locals().items() if name in RunConfig.__dataclass_fields__}
    config = RunConfig(
        **options,
        task_options={**context.meta.get("task_options", {}), **task_options(task_option or [])},
        method_options={**context.meta.get("method_options", {}), **method_options(method_option or [])},
    )
    folder = _default_folder(config) if out is None else out

    from pahq.api import execute

    more: dict[str, Any] = {"streams": streams, "trace": trace, "view": view, "tracking": tracking}
    outcome = guarded(lambda how: execute(config, folder, **more, **how), quiet, _left(folder))
    _print(outcome, folder, quiet, as_json)


@app.command()
@tracked
def resume(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    streams: Streams = None,
    trace: Trace = None,
    view: View = True,
    tracking: Tracking | None = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Go on with a run that was cut short."""
    from pahq.api import resume as resume_run

    more: dict[str, Any] = {"streams": streams, "trace": trace, "view": view, "tracking": tracking}
    outcome = guarded(lambda how: resume_run(run, **more, **how), quiet, _left(str(run)))
    _print(outcome, str(run), quiet, as_json)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or of a circuit.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print the summary of a finished run, or of a circuit, again."""
    from pahq.evaluation.circuit import JSON_FILE, Circuit
    from pahq.report.folder import RUN_FILE, START_FILE

    record = None
    if (run / RUN_FILE).exists():
        record = read_json(run / RUN_FILE)
    elif (run / START_FILE).exists():
        raise PahqError(f"{run}: this run is not finished; go on with it: pahq resume {run}")
    elif not (run / JSON_FILE).exists():
        raise PahqError(f"{run}: there is no finished run ({RUN_FILE} is missing); check the path")
    _summary(Circuit.load(run), record, str(run), quiet, as_json)


def _default_folder(config: RunConfig) -> str:
    parts = [Path(config.model).stem, Path(config.task).stem]
    if config.method != "acdc":
        parts.append(config.method)
    if config.prefilter is not None:
        parts += [config.prefilter, *([] if config.keep is None else [f"{config.keep:g}"])]
        parts += ["ordered"] if config.order_by_score else []
    parts.append(config.metric or "default")
    if config.threshold is not None:
        parts.append(f"{config.threshold:g}")
    if config.edges is not None:
        parts += [config.rule, str(config.edges)]
    if config.policy != "fp32":
        parts.append(Path(config.policy).stem if config.policy.endswith(".json") else config.policy)
    return str(Path("runs") / re.sub(r"[^\w.-]+", "_", "-".join(parts)))


def _left(folder: str) -> Callable[[], str]:
    """What an interrupted search leaves."""
    from pahq.report.folder import START_FILE

    begun = Path(folder) / START_FILE
    return lambda: f"go on with: pahq resume {folder}" if begun.exists() else "nothing was begun"


def _print(outcome: Outcome, folder: str, quiet: bool, as_json: bool) -> None:
    known = outcome.was_finished
    if known and not quiet:
        print(
            f"{folder}: this run is finished; nothing was changed (see it again: pahq show {folder})", file=sys.stderr
        )
    _summary(outcome.circuit, outcome.record, folder, quiet or known, as_json, written=None if known else folder)


def _summary(
    circuit: Circuit, record: dict[str, Any] | None, folder: str, quiet: bool, as_json: bool, written: str | None = None
) -> None:
    from pahq.report import summary

    try:
        tell(
            {"run": folder, **summary.as_json(circuit, record)},
            lambda console: summary.show(circuit, record, console),
            quiet=quiet,
            as_json=as_json,
            written=written,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise PahqError(f"run.json or circuit.json: {error} is missing or damaged; run the search anew") from error


def _add_others() -> None:
    from pahq.cli.convert import convert
    from pahq.cli.evaluate import compare, evaluate
    from pahq.cli.examples import add_examples
    from pahq.cli.methods import methods
    from pahq.cli.plot import plot
    from pahq.cli.precision import policies, precision_app
    from pahq.cli.reproduce import reproduce_app
    from pahq.cli.sweep import sweep
    from pahq.cli.tasks import tasks_app
    from pahq.cli.truth import truth
    from pahq.cli.view import view

    app.command()(methods)
    app.add_typer(tasks_app, name="tasks")
    app.command()(truth)
    app.command()(sweep)
    app.command()(evaluate)
    app.command()(compare)
    app.command()(plot)
    app.command()(view)
    app.command()(convert)
    app.command()(policies)
    app.add_typer(precision_app, name="precision")
    app.add_typer(reproduce_app, name="reproduce")
    add_examples(app)


_add_others()


def main() -> None:
    """Entry point: runs the command; every error a user can cause becomes one line and an exit code (see ``codes``)."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the reader's encoding lacks ends no command
        sys.stdout.reconfigure(errors="replace")
    words = sys.argv[1:]
    if not watched(sys.stderr) or {"-q", "--quiet"} & set(words):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # downloads are as silent as all else is
    manner = Manner("--json" in words)
    try:
        code = app(standalone_mode=False, obj=manner)
        if code == codes.INTERRUPTED:  # typer made an exit code of Ctrl-C that no command had an answer to
            raise KeyboardInterrupt
    except PahqError as error:
        code = fail(str(error), codes.REFUSED, manner.as_json)
    except BrokenPipeError:
        mute()
        code = codes.DONE
    except OSError as error:
        code = fail(explain(error), codes.REFUSED, manner.as_json)
    except Interrupted as error:
        code = fail(str(error), codes.INTERRUPTED, manner.as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = fail("interrupted; run the same command again", codes.INTERRUPTED, manner.as_json)
    except Exception as error:
        if not isinstance(error, _ClickException):
            if manner.as_json:
                failed(f"{type(error).__name__}: {error}", codes.BUG)
            raise
        code = _usage(error, manner.as_json)
    sys.exit(code or codes.DONE)


def _usage(error: Any, as_json: bool) -> int:
    message = error.format_message()
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "pahq"
    if not message or type(error).__name__ == "NoArgsIsHelpError":
        print(message)
        return codes.DONE
    message = _conversion(error, message.rstrip("."))
    return fail(f"{message} (see '{path} --help')", codes.REFUSED, as_json)


def _conversion(error: Any, message: str) -> str:
    """A value of the wrong type is named: typer's own message says only what it should have been."""
    errors = getattr(error.__cause__, "errors", None)
    found = re.fullmatch(r"(Invalid value for .*?): Input should be (an? [\w ]+).*", message)
    if errors is None or found is None:
        return message
    return f"{found[1]}: {str(errors()[0]['input'])!r} is not {found[2]}"
