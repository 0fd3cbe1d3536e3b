"""Events to Weights & Biases. The only place that imports ``wandb``, and only when it is asked for."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.report.notebook import in_notebook
from pahq.report.tables import as_json
from pahq.report.tracking.event import Event, flat
from pahq.report.tracking.settings import WANDB_FOLDER, Tracking

PROJECT = "pahq"
HEADER_BYTES = 7
"""Size of a ``.wandb`` file without any record."""
UNWRITTEN = 3.0
"""Seconds without a record after which nobody is writing such a file."""
PATIENCE = 30.0
"""Seconds that the server may take to answer when a run begins."""
UPLOAD_PATIENCE = 120.0
"""Seconds that the rest may take to be sent when a run has ended; it stays on disk."""
_FRAME, _BESIDE = ("event", "number", "time"), ("tables", "files")
"""Parts of an event's JSON that W&B has in its own way."""
_ARTIFACTS = {"discover": "circuit", "evaluate": "evaluation", "compare": "comparison"}
"""Job -> type of the artifact that holds its files."""


class Wandb:
    """Sends events to one W&B run.

    settings: how, see ``Tracking``. id: of the W&B run to go on with, None for a new one. folder: where W&B's own
    files lie (in ``wandb``, unless WANDB_DIR says otherwise), None: where W&B puts them. job: ``discover``,
    ``evaluate`` or ``compare``; config: what is known of the run by now. say: told one line of news.

    An event's number is W&B's step. Facts of ``started`` are the config, those of ``progress`` the history by
    ``PHASE/NAME``, those of ``finished`` the summary; tables are logged, files are an artifact.

    Raises PahqError where wandb is missing or refuses the settings, or the server does not answer. A failure later on
    is told in one line, and the run goes on without.
    """

    def __init__(
        self,
        settings: Tracking,
        id: str | None,
        folder: Path | None,
        job: str,
        config: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._say, self._job, self._resumed, self._broken = say, job, id is not None, False
        self._phases: set[str] = set()
        try:
            import wandb
        except ImportError as error:
            raise PahqError(
                f"wandb: it cannot be imported ({error}); install it (pip install 'pahq[wandb]'), or take --no-wandb"
            ) from error
        self._wandb = wandb
        where = None if folder is None or os.environ.get("WANDB_DIR") else str(folder.resolve())
        if where is not None and id is not None:
            _clear_empty(Path(where) / WANDB_FOLDER, id)
            _await_another_second(Path(where) / WANDB_FOLDER, id)
        flushed: dict[str, Any] = {}
        if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:  # no public setting, and may go
            flushed["x_transaction_log_flush_interval"] = 1.0  # seconds that a kill can cost, instead of 15
        fresh = where is not None and not (Path(where) / WANDB_FOLDER).exists()
        name = settings.name or os.environ.get("WANDB_NAME") or (None if folder is None else folder.resolve().name)
        try:
            with _silent():
                self._run = wandb.init(
                    id=secrets.token_hex(8) if id is None else id,
                    resume="allow",
                    reinit="create_new",  # runs of the caller's own stay as they are
                    mode=settings.mode,  # pyright: ignore[reportArgumentType]  (judged by Tracking)
                    project=settings.project or os.environ.get("WANDB_PROJECT") or PROJECT,
                    entity=settings.entity,
                    group=settings.group,
                    name=name,
                    tags=list(settings.tags) or None,
                    job_type=job,
                    dir=where,
                    config=config,
                    allow_val_change=True,
                    settings=wandb.Settings(
                        silent=True,
                        console="off",  # what is printed is the caller's
                        disable_git=True,  # of the working directory, which is not ours; the record has pahq's commit
                        disable_code=True,
                        save_code=False,
                        init_timeout=PATIENCE,
                        finish_timeout=UPLOAD_PATIENCE,
                        finish_timeout_raises=True,
                        **flushed,
                    ),
                )
        except Exception as error:
            if where is not None and fresh:
                shutil.rmtree(Path(where) / WANDB_FOLDER, ignore_errors=True)
            raise PahqError(f"wandb: {_line(error)}; mend that, take --wandb-mode offline, or --no-wandb") from error
        self._tell()

    def _tell(self) -> None:
        run = self._run
        if run.disabled:
            self._say("W&B: switched off (WANDB_MODE)")
        elif run.offline:
            self._say(f"W&B: kept offline; send it with: {self._sync}")
        else:
            self._say(f"W&B: {run.url}")

    @property
    def _sync(self) -> str:
        """The command that sends what W&B keeps of this run on the disk, with the parts of earlier processes."""
        place = Path(self._run.dir).parent
        if not self._resumed:
            return f"wandb sync {shlex.quote(os.path.relpath(place))}"
        return f"wandb sync {shlex.quote(os.path.relpath(place.parent))}/*run-*-{self._run.id}"

    def kept(self) -> dict[str, Any] | None:
        """What the run's folder keeps, so that a resumed run goes on here; None where W&B is switched off."""
        run = self._run
        if run.disabled:
            return None
        return {
            "id": run.id,
            "mode": "offline" if run.offline else "online",
            "project": run.project,
            "entity": run.entity or None,
            "group": run.group or None,
            "name": run.name,
            "tags": list(run.tags or ()),
            "url": None if run.offline else run.url,
        }

    def emit(self, event: Event) -> None:
        if self._broken:
            return
        try:
            if event.kind == "started":
                self._start(event)
            elif event.kind == "progress":
                self._progress(event)
            else:
                self._end(event)
        except Exception as error:
            self._fail(f"({_line(error)}); the run goes on without it")

    def _start(self, event: Event) -> None:
        facts = event.to_json()
        for name in _FRAME:
            del facts[name]
        self._run.config.update({**facts.pop("config", {}), **facts}, allow_val_change=True)

    def _progress(self, event: Event) -> None:
        facts = flat(event.to_json())
        phase = facts.pop("phase")
        for name in _FRAME:
            del facts[name]
        if phase not in self._phases:
            self._phases.add(phase)
            steps = next((name for name in ("tests", "done") if name in facts), None)
            if steps is not None:
                self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/{steps}")
        self._run.log({f"{phase}/{name}": value for name, value in facts.items()}, step=event.number)

    def _end(self, event: Event) -> None:
        facts = flat({name: value for name, value in event.to_json().items() if name not in (*_FRAME, *_BESIDE)})
        self._run.summary.update({**facts, "state": event.kind})
        for name, table in event.tables.items():
            rows: list[Any] = as_json([list(row) for row in table.rows])
            self._run.log({name: self._wandb.Table(columns=list(table.columns), data=rows)}, step=event.number)
        if event.files:
            artifact = self._wandb.Artifact(f"{self._job}-{self._run.id}", _ARTIFACTS[self._job])
            for path in event.files:
                artifact.add_file(str(path), name=path.name)
            self._run.log_artifact(artifact)

    def close(self, code: int) -> None:
        try:
            with _silent():
                self._run.finish(exit_code=code)
        except TimeoutError:
            self._fail(f"did not take everything in {UPLOAD_PATIENCE:.0f} s; send it with: {self._sync}")
        except Exception as error:
            self._fail(f"({_line(error)}); what it has may lack the end")
            with contextlib.suppress(Exception), _silent():  # else it speaks up once more when the process ends
                self._wandb.teardown()

    def _fail(self, how: str) -> None:
        if not self._broken:
            self._broken = True
            self._say(f"note: W&B failed {how}")


def _await_another_second(folder: Path, id: str) -> None:
    """W&B names folders by second and run: a run taken up within the second would overwrite what it goes on from."""
    while any(folder.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{id}")):
        time.sleep(0.05)


def _clear_empty(folder: Path, id: str) -> None:
    """Takes away what a process left that was killed before W&B wrote anything: ``wandb sync`` stumbles over it.

    A run that has just ended may be written still, by W&B's own process: it is given some time.
    """
    for file in folder.glob(f"*run-*-{id}/run-{id}.wandb"):
        while file.stat().st_size <= HEADER_BYTES and time.time() - file.stat().st_mtime < UNWRITTEN:
            time.sleep(0.1)
        if file.stat().st_size <= HEADER_BYTES:
            shutil.rmtree(file.parent, ignore_errors=True)


def _line(error: BaseException) -> str:
    """What wandb says, in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _silent() -> contextlib.AbstractContextManager[Any]:
    """Keeps wandb's own words off the screen; in a notebook it may ask for the key, and must be seen."""
    return contextlib.nullcontext() if in_notebook() else contextlib.redirect_stderr(io.StringIO())
