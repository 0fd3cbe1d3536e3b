"""Reads what wandb writes offline: LevelDB's log format with records of wandb's own protocol buffers."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def payloads(data: bytes) -> list[bytes]:
    """The records of a file; fails on a damaged one. A torn last one, as a killed process leaves it, is dropped."""
    assert data[:7] == HEADER
    found, parts, at = [], b"", 7
    while at + 7 <= len(data):
        room = BLOCK - at % BLOCK
        if room < 7:  # the rest of a block that takes no record's head is filled up with zeros
            at += room
            continue
        check, length, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + 7 : at + 7 + length]
        if len(part) < length:
            break
        assert zlib.crc32(part, zlib.crc32(bytes([kind]))) == check
        at += 7 + length
        parts = part if kind in (FULL, FIRST) else parts + part
        if kind in (FULL, LAST):
            found.append(parts)
    return found


class Offline:
    """One offline run.

    history: step -> what was logged there. config, summary: their last state. run: id, project … as they were sent.
    artifacts: name -> (type, names of files). exit_code: None if the run was not finished.
    """

    def __init__(self, folder: Path) -> None:
        from wandb.proto import wandb_internal_pb2 as protocol

        (file,) = folder.glob("run-*.wandb")
        self.folder = folder
        self.history: dict[int, dict[str, Any]] = {}
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.artifacts: dict[str, tuple[str, list[str]]] = {}
        self.run: Any = None
        self.exit_code: int | None = None
        for payload in payloads(file.read_bytes()):
            record: Any = protocol.Record()  # pyright: ignore[reportAttributeAccessIssue]  (made at run time)
            record.ParseFromString(payload)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                _update(self.config, record.run.config.update)
            elif kind == "config":
                _update(self.config, record.config.update)
            elif kind == "summary":
                _update(self.summary, record.summary.update)
            elif kind == "history":
                row: dict[str, Any] = {}
                _update(row, record.history.item)
                step = record.history.step.num if record.history.HasField("step") else row["_step"]
                self.history.setdefault(step, {}).update(row)
            elif kind == "artifact":
                manifest = record.artifact.manifest
                self.artifacts[record.artifact.name] = record.artifact.type, sorted(e.path for e in manifest.contents)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    def logged(self) -> dict[int, dict[str, Any]]:
        """The history without what wandb adds."""
        rows = {step: {k: v for k, v in row.items() if not k.startswith("_")} for step, row in self.history.items()}
        return {step: row for step, row in rows.items() if row}

    def table(self, name: str) -> dict[str, Any]:
        """The table that was logged under ``name``: columns and data."""
        (row,) = [row for row in self.history.values() if name in row]
        return json.loads((self.folder / "files" / row[name]["path"]).read_text())


def offline_runs(run: Path) -> list[Offline]:
    """The offline runs of a run's folder, in the order in which they began."""
    return [Offline(folder) for folder in sorted((run / "wandb").glob("offline-run-*"))]


def _update(into: dict[str, Any], items: Any) -> None:
    for item in items:
        *path, last = list(item.nested_key) or [item.key]
        at = into
        for word in path:
            at = at.setdefault(word, {})
        at[last] = json.loads(item.value_json)
