"""The options ``--wandb…`` that commands share, handed to a command as one value."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

ARGUMENT = "tracking"
_OPTIONS: dict[str, Any] = {
    "wandb": Annotated[
        bool | None,
        typer.Option("--wandb/--no-wandb", help="Track with Weights & Biases (default: as the folder's run began)."),
    ],
    "wandb_mode": Annotated[
        str | None, typer.Option(help="online or offline, for 'wandb sync' later (default: WANDB_MODE, or online).")
    ],
    "wandb_project": Annotated[str | None, typer.Option(help="Project (default: WANDB_PROJECT, or pahq).")],
    "wandb_entity": Annotated[str | None, typer.Option(help="User or team (default: W&B's own).")],
    "wandb_group": Annotated[str | None, typer.Option(help="Group of runs.")],
    "wandb_name": Annotated[str | None, typer.Option(help="Name of the run (default: its folder's).")],
    "wandb_tags": Annotated[str | None, typer.Option(help="Tags, with commas between them.")],
}


def tracked(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options in the place of its argument ``tracking``: ``Tracking``, None if none was given."""
    hints = get_type_hints(command, localns={"Tracking": object}, include_extras=True)  # a name for type checkers alone
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == ARGUMENT:
            for name, annotation in _OPTIONS.items():
                parameters.append(inspect.Parameter(name, parameter.kind, default=None, annotation=annotation))
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        from pahq.report.tracking.settings import tracking_of

        chosen = {name: given.pop(name) for name in _OPTIONS}
        command(**given, **{ARGUMENT: tracking_of(**chosen)})

    wrapper.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]  (PEP 362)
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper
