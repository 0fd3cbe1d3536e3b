"""``pahq tasks``: what tasks there are, and what one looks like to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pahq.cli.options import task_options
from pahq.cli.output import Json, Quiet, tell
from pahq.errors import PahqError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from pahq.task import Prompts, Task

MEASURED = 50
"""Examples over which ``show`` measures the model, where the task has so many."""
ANSWERS_SHOWN = 6
SHOWN = 5

tasks_app = typer.Typer(help="List the tasks, or show one as a model sees it.", no_args_is_help=False)


@tasks_app.callback(invoke_without_command=True)
def default(context: typer.Context, quiet: Quiet = False, as_json: Json = False) -> None:
    """List the tasks, or show one as a model sees it."""
    if context.invoked_subcommand is None:
        list_command(quiet, as_json)
    elif quiet or as_json:
        flag = "--json" if as_json else "--quiet"
        raise PahqError(f"{flag}: it stands before '{context.invoked_subcommand}'; write it behind")


@tasks_app.command("list")
def list_command(quiet: Quiet = False, as_json: Json = False) -> None:
    """List the tasks with their default metrics."""
    from pahq.task import list_tasks

    names = ("name", "default_metric", "description")
    rows = [{name: getattr(task, name) for name in names} for task in list_tasks()]
    tell(rows, lambda console: _print_list(console, rows), quiet=quiet, as_json=as_json)


def _print_list(console: Console, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("task", "default metric", "what it asks"):
        table.add_column(title, no_wrap=title != "what it asks")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    console.print("\nAlso: a .jsonl or .csv file with clean, corrupt, answers and wrong_answers.")


@tasks_app.command("show")
def show(
    name: Annotated[
        str, typer.Argument(metavar="TASK", help="A task's name, a .jsonl, .csv or .json file, or a known circuit.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Embedded name, hub id, folder or .gguf file (default: a circuit's own, or smollm2-135m)."),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="Prompts to print (default: 5, or a short file's all).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    split: Annotated[str, typer.Option(help="train, validation, test or all.")] = "validation",
    pad: Annotated[bool, typer.Option("--pad", help="Allow prompts of unequal length (files only).")] = False,
    bos: Annotated[bool, typer.Option("--bos", help="Start prompts with the beginning-of-sequence token.")] = False,
    task_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the task, such as templates=8; repeat for more."),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show prompts as a model sees them, and how it does.

    Tokens are marked where clean and corrupted prompts differ.
    """
    from pahq.evaluation.truth.base import OWN, load_truth
    from pahq.inputs import task_of
    from pahq.model import load_model
    from pahq.task.custom import FileTask

    options: dict[str, Any] = {option: True for option, on in (("pad", pad), ("prepend_bos", bos)) if on}
    task = task_of(name, task_options(task_option or []) | options)
    model = model or (name if name.startswith(OWN) else "smollm2-135m")
    loaded = load_truth(model).model() if model.startswith(OWN) else load_model(model)
    if n is None:
        n = min(SHOWN, max(task.available(split, loaded), 1)) if isinstance(task, FileTask) else SHOWN
    prompts = _as_many_as(task, loaded, n, seed, split)
    report = _measure(task, loaded, prompts) | {"split": split, "seed": seed}
    shown = [_pair(loaded.tokenizer, prompts, row) for row in range(n)]
    tell(report | {"prompts": shown}, lambda console: _print(console, report, shown), quiet=quiet, as_json=as_json)


def _as_many_as(task: Task, model: Any, n: int, seed: int, split: str) -> Prompts:
    """At least ``n`` examples, up to ``MEASURED`` where there are so many (files may be short)."""
    if n >= MEASURED:
        return task.prompts(model, n, seed, split)
    wanted = task.prompts(model, n, seed, split)  # first, so that what is wrong with the task is told
    try:
        return task.prompts(model, MEASURED, seed, split) if n else wanted
    except PahqError:
        return wanted


def _measure(task: Task, model: Any, prompts: Prompts) -> dict[str, Any]:
    from pahq.task import logit_difference, read_logits

    scores: dict[str, dict[str, float]] = {"accuracy": {}, "logit_difference": {}}
    for side in ("clean", "corrupt"):
        logits = read_logits(model, prompts, side)
        scores["accuracy"][side] = task.accuracy(logits, prompts)
        scores["logit_difference"][side] = logit_difference(logits, prompts)
    return {
        "task": task.name,
        "description": task.description,
        "model": model.config.name,
        "examples": len(prompts),
        "tokens": prompts.clean.shape[1],
    } | scores


def _pair(tokenizer: Any, prompts: Prompts, row: int) -> dict[str, Any]:
    """One example as texts of tokens (numbers where there is no tokenizer); ``differ`` and ``read`` are positions."""

    def spell(ids: Any) -> list[str]:
        return [f" {token}" if tokenizer is None else tokenizer.decode([token]) for token in ids.tolist()]

    length = prompts.clean.shape[1] if prompts.pad is None else int((~prompts.pad[row]).sum())
    clean, corrupt = prompts.clean[row, :length], prompts.corrupt[row, :length]
    at = prompts.read_mask[row]
    answers, wrong = prompts.answers[row][at].flatten(), prompts.wrong[row][at].flatten()
    return {
        "clean": spell(clean),
        "corrupt": spell(corrupt),
        "differ": (clean != corrupt).nonzero().flatten().tolist(),
        "read": prompts.read[row][at].tolist(),
        "answers": spell(answers[answers >= 0]),
        "wrong_answers": spell(wrong[wrong >= 0]),
    }


def _print(console: Console, report: dict[str, Any], shown: list[dict[str, Any]]) -> None:
    console.soft_wrap = True  # prompts stay whole, to be copied
    colour = console.color_system is not None
    console.print(f"{report['task']}: {report['description']}")
    for number, pair in enumerate(shown, 1):
        console.print()
        for side, style in (("clean", "bold green"), ("corrupt", "bold red")):
            console.print(_marked(f"{number:>3} {side:<8}", pair[side], set(pair["differ"]), style if colour else None))
        answers = f"    answer   {_few(pair['answers'])}"
        if pair["wrong_answers"]:
            answers += f", not {_few(pair['wrong_answers'])}"
        console.print(answers)
    examples = "example" if report["examples"] == 1 else "examples"
    console.print()
    console.print(
        f"{report['model']} on {report['examples']} {examples} of split {report['split']} (seed {report['seed']}), "
        f"{report['tokens']} tokens each:",
    )
    for side in ("clean", "corrupt"):
        console.print(
            f"  {side:<8} accuracy {report['accuracy'][side]:.2f}   "
            f"logit difference {report['logit_difference'][side]:+.2f}",
        )


def _marked(head: str, tokens: list[str], differ: set[int], style: str | None) -> Text:
    """The prompt on one line; differing tokens in colour, or in brackets where there is none."""
    from rich.text import Text

    line = Text(head)
    for position, token in enumerate(tokens):
        token = token.replace("\n", "\\n")
        if position not in differ:
            line.append(token)
        elif style:
            line.append(token, style=style)
        else:
            line.append(f"[{token}]")
    return line


def _few(answers: list[str]) -> str:
    more = f" … ({len(answers)} in all)" if len(answers) > ANSWERS_SHOWN else ""
    return " ".join(f"'{answer}'" for answer in answers[:ANSWERS_SHOWN]) + more
