"""The folder of one run: who may write to it, what run it belongs to, and whether that run is finished.

``start.json`` is written first and says what the run is. ``journal.jsonl`` (a sweep) or ``state.safetensors`` (scores
of edges) tells how far it has come; ``scores.safetensors`` holds scores once they are made. ``circuit.json``,
``circuit.safetensors`` and, last of all, ``run.json`` appear when it is finished.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.files import naming, read_json, write_json
from pahq.report.config import RunConfig
from pahq.report.tracking.settings import TRACKING_FILE, WANDB_FOLDER

START_FILE, RUN_FILE, LOCK_FILE = "start.json", "run.json", ".lock"
FORMAT = "pahq-run-1"


class RunFolder:
    """An open run folder, held by this process alone until ``close`` (or the process's end).

    A finished run is only read, so its folder is neither locked nor written to; nor is any without ``hold``.

    Raises PahqError where the folder cannot be made or written, belongs to something else, or is
    being written by another process.
    """

    def __init__(self, path: str | os.PathLike[str], create: bool = True, hold: bool = True) -> None:
        self.path = Path(path)
        with naming(self.path):
            if create and hold:
                self.path.mkdir(parents=True, exist_ok=True)
            found = sorted(entry.name for entry in self.path.iterdir())
        ours = START_FILE in found
        # A run killed in its first instants leaves at most the lock, what tracking began with and a temporary file.
        early = (LOCK_FILE, TRACKING_FILE, WANDB_FOLDER)
        strangers = [name for name in found if name not in early and not name.endswith(".tmp")]
        if not ours and (strangers or not create):
            what = f"it holds '{strangers[0]}', but no {START_FILE}" if strangers else f"it has no {START_FILE}"
            raise PahqError(f"{self.path}: not the folder of a run ({what}); choose a new or empty folder")
        self._lock: int | None = None
        if self.finished or not hold:
            return
        with naming(self.path):
            self._lock = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # The system drops the lock when the process ends, however it ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise PahqError(
                f"{self.path}: another process is writing this run; wait for it, or choose another folder"
            ) from None
        except OSError:  # some network file systems have no locks: go on without rather than refuse to work
            pass
        for name in found:
            if name.endswith(".tmp"):
                with naming(self.path / name):
                    (self.path / name).unlink(missing_ok=True)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        return (self.path / RUN_FILE).exists()

    def start_record(self) -> dict[str, Any] | None:
        """What ``begin`` wrote, or None in a new folder; raises PahqError if it is damaged."""
        file = self.path / START_FILE
        if not file.exists():
            return None
        record = read_json(file)
        if record.get("format") != FORMAT or not isinstance(record.get("config"), dict):
            raise PahqError(f"{file}: the file is damaged or of another version of pahq; choose another folder")
        return record

    def config(self) -> RunConfig | None:
        """The configuration of the run in here, None in a new folder."""
        record = self.start_record()
        return None if record is None else RunConfig.from_dict(record["config"], str(self.path / START_FILE))

    def check(self, config: RunConfig) -> None:
        """Raises PahqError naming the option if the run in here has another configuration."""
        there = self.config()
        difference = None if there is None else config.difference(there)
        if difference:
            raise PahqError(
                f"{self.path}: holds another run ({difference}); choose another folder, or repeat that run's options"
            )

    def check_policy(self, spec: str, table: dict[str, Any]) -> None:
        """Raises PahqError if the run in here began under another table; a policy's file may have changed since."""
        then = (self.start_record() or {}).get("policy", table)
        if then != table:
            raise PahqError(
                f"{self.path}: the policy '{spec}' is no longer what this run began with; "
                f"bring the old one back ({START_FILE} has its table), or choose another folder"
            )

    def begin(self, config: RunConfig, identity: dict[str, str], facts: dict[str, Any]) -> dict[str, Any]:
        """Writes the start record, or compares with the one that is there, and returns it.

        identity: name -> fingerprint of what the run computes on (weights, prompts). It must not
        change between a start and its resumption; PahqError says which did.
        """
        record = self.start_record()
        if record is None:
            record = {"format": FORMAT, "config": config.to_dict(), "identity": identity, **facts}
            write_json(self.path / START_FILE, record)
            return record
        self.check(config)
        before = record.get("identity", {})
        for name, fingerprint in identity.items():
            if before.get(name) != fingerprint:
                raise PahqError(
                    f"{self.path}: the {name} are no longer those this run began with (fingerprint {fingerprint[:12]}, "
                    f"then {str(before.get(name))[:12]}); bring the old ones back, or choose another folder"
                )
        return record
