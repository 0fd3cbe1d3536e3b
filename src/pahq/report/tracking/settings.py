"""Whether and how a run is tracked with Weights & Biases, as users say it and as its folder keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.files import read_json, write_json

TRACKING_FILE = "tracking.json"
WANDB_FOLDER = "wandb"
"""Where W&B keeps its own files within a run's folder; the name is W&B's."""
FORMAT = "pahq-tracking-1"
MODES = ("online", "offline")
_FORBIDDEN = "/\\#?%:"  # in the name of a project, by W&B's rules


@dataclass(frozen=True)
class Tracking:
    """How a run is tracked. Nothing of this changes its result.

    wandb: whether events go to Weights & Biases, too (``pip install 'pahq[wandb]'``).
    mode: ``online``, or ``offline`` for files that ``wandb sync`` sends later. None: WANDB_MODE, or else online.
    project: None: WANDB_PROJECT, or else ``pahq``. entity: user or team, None: W&B's own default.
    group, name: None: no group; the name of the run's folder. tags: of 1 to 64 characters each.
    A run that goes on keeps what it began with where None, or no tag, is given.
    Raises PahqError for a value that W&B does not take.
    """

    wandb: bool = True
    mode: str | None = None
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise PahqError(f"wandb mode: '{self.mode}' is unknown; known: {', '.join(MODES)}")
        for option in ("project", "entity", "group", "name"):
            value = getattr(self, option)
            if value is not None and not (isinstance(value, str) and value.strip() and len(value) <= 128):
                raise PahqError(f"wandb {option}: {value!r} cannot be; give text of 1 to 128 characters")
        for option in ("project", "entity"):
            odd = sorted(set(getattr(self, option) or "") & set(_FORBIDDEN))
            if odd:
                raise PahqError(
                    f"wandb {option}: '{getattr(self, option)}' holds '{odd[0]}'; W&B takes none of {_FORBIDDEN}"
                )
        if isinstance(self.tags, str):
            raise PahqError(f"wandb tags: {self.tags!r} is text; give a list of texts")
        object.__setattr__(self, "tags", tuple(self.tags))
        for tag in self.tags:
            if not (isinstance(tag, str) and tag.strip() and len(tag) <= 64):
                raise PahqError(f"wandb tags: {tag!r} cannot be; give texts of 1 to 64 characters")

    def after(self, kept: dict[str, Any], where: Path) -> Tracking:
        """These settings, completed by those that the run began with.

        Raises PahqError for another project or entity: the run lies in that one.
        """
        for option in ("project", "entity"):
            mine, theirs = getattr(self, option), kept.get(option)
            if mine is not None and theirs is not None and mine != theirs:
                raise PahqError(
                    f"{where}: is tracked in the {option} '{theirs}', not in '{mine}'; leave --wandb-{option} out"
                )
        names = ("mode", "project", "entity", "group", "name")
        chosen = {name: kept.get(name) if getattr(self, name) is None else getattr(self, name) for name in names}
        return Tracking(self.wandb, **chosen, tags=self.tags or tuple(kept.get("tags", ())))


def tracking_of(wandb: bool | None, wandb_tags: str | None, **more: str | None) -> Tracking | None:
    """Options ``--wandb…`` as they were given -> ``Tracking``, None for none; raises PahqError for what cannot be.

    wandb_tags: with commas between them. more: the other fields of ``Tracking``, as ``wandb_NAME``.
    """
    given = {name: value for name, value in (more | {"wandb_tags": wandb_tags}).items() if value is not None}
    if not wandb:
        if given:
            name = next(iter(given)).replace("_", "-")
            raise PahqError(
                f"{name}: '{next(iter(given.values()))}' goes with --wandb; give that, too, or leave it out"
            )
        return None if wandb is None else Tracking(wandb=False)
    options: dict[str, Any] = {name.removeprefix("wandb_"): value for name, value in given.items()}
    if wandb_tags is not None:
        options["tags"] = tuple(tag.strip() for tag in wandb_tags.split(","))
    return Tracking(**options)


def read_kept(folder: Path) -> dict[str, Any] | None:
    """How the run in ``folder`` is tracked (fields of ``Tracking``, and ``id``), None if it is not.

    Raises PahqError for a damaged file.
    """
    file = folder / TRACKING_FILE
    if not file.exists():
        return None
    record = read_json(file)
    kept = record.get("wandb")
    if record.get("format") != FORMAT or not isinstance(kept, dict) or not isinstance(kept.get("id"), str):
        raise PahqError(f"{file}: the file is damaged or of another version of pahq; remove it to track the run anew")
    return kept


def write_kept(folder: Path, kept: dict[str, Any]) -> None:
    """What ``read_kept`` reads."""
    write_json(folder / TRACKING_FILE, {"format": FORMAT, "wandb": kept})
