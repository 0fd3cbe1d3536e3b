"""Circuits and prompts in the formats of others, read and written: what ``pahq convert`` calls.

Formats are told apart by what is in a file. Nothing is dropped silently: ``Converted.lost`` lists it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.graph import Graph
from pahq.report.interchange import acdc, eap_ig, eap_ig_tensors, own, prompts
from pahq.report.interchange.files import File
from pahq.report.interchange.links import UNKNOWN, Reading, groups_unsaid

__all__ = ["FORMATS", "Converted", "convert", "read_circuit", "write_circuit"]


class _Circuits(NamedTuple):
    matches: Callable[[File], bool]
    read: Callable[[File, Graph | None], Reading]
    write: Callable[[Circuit, Path], list[str]]


_CIRCUITS = {
    "pahq": _Circuits(own.matches, own.read, own.write),
    "eap-ig": _Circuits(eap_ig.matches, eap_ig.read, eap_ig.write),
    "eap-ig-pt": _Circuits(eap_ig_tensors.matches, eap_ig_tensors.read, eap_ig_tensors.write),
    "acdc": _Circuits(acdc.matches, acdc.read, acdc.write),
}
_PROMPTS = {prompts.AUTOCIRCUIT: prompts.write_autocircuit, prompts.LINES: prompts.write_lines}
FORMATS = {
    "pahq": "a circuit as a folder (a run's, or its circuit.json)",
    "eap-ig": "EAP-IG's graph or MIB's importances, .json",
    "eap-ig-pt": "the same as tensors, .pt",
    "acdc": "ACDC's edges as JSON (also read: lists of kept edges, JSON lines, a run's log)",
    prompts.AUTOCIRCUIT: "AutoCircuit's prompts, .json",
    prompts.LINES: "prompts as JSON lines, .jsonl (also read: EAP-IG's .csv)",
}
"""Every format by name, with one line about it."""
_ENDINGS = {"": "pahq", ".pt": "eap-ig-pt", ".jsonl": prompts.LINES}


@dataclass(frozen=True)
class Converted:
    """read_as, written_as: names of ``FORMATS``. count: edges kept, or prompt pairs.

    lost: what either format, or the model's graph, has no place for, one line each, beginning with whose loss it is.
    """

    source: str
    target: str
    read_as: str
    written_as: str
    what: str
    count: int
    lost: tuple[str, ...]


def convert(
    source: str | PathLike[str],
    target: str | PathLike[str],
    read_as: str | None = None,
    write_as: str | None = None,
    graph: Graph | None = None,
    replace: bool = False,
) -> Converted:
    """Reads a circuit or prompts from ``source`` and writes them to ``target``.

    read_as, write_as: names of ``FORMATS``; None: by the content of ``source``, by the ending of ``target``.
    graph: the model's, for circuits; None: what the file tells. replace: whether ``target`` may be there already.
    Raises PahqError for what cannot be read, written, or told apart.
    """
    target = Path(target)
    for name in (read_as, write_as):
        if name is not None and name not in FORMATS:
            raise PahqError(f"format '{name}' is unknown; known: {', '.join(FORMATS)}")
    if target.exists() and not replace and not (target.is_dir() and not any(target.iterdir())):
        raise PahqError(f"{target}: is there already; choose another path, or replace it with --force")
    file = File(Path(source))
    read_as = _told_apart(file) if read_as is None else read_as
    written_as = _written_as(target, read_as) if write_as is None else write_as
    if (read_as in _CIRCUITS) != (written_as in _CIRCUITS):
        what = ("a circuit", "prompts") if read_as in _CIRCUITS else ("prompts", "a circuit")
        raise PahqError(f"{source}: holds {what[0]}, but '{written_as}' is a format of {what[1]}; choose another")
    if target.is_dir() != (written_as == "pahq") and target.exists():
        raise PahqError(f"{target}: '{written_as}' is not written over {'a folder' if target.is_dir() else 'a file'}")
    if read_as in _CIRCUITS:
        reading = _CIRCUITS[read_as].read(file, graph)
        circuit, unread = reading.circuit, list(reading.lost)
        if circuit.graph.config.architecture == UNKNOWN and written_as == "pahq" != read_as:
            unread.append(
                "it does not tell the model's sizes: those that edges do not show are 1 (name the model with --model)"
            )
        if graph is None and read_as != "pahq":
            unread += groups_unsaid(circuit)
        unwritten = _CIRCUITS[written_as].write(circuit, target)
        what, count = "circuit", circuit.n_edges
    else:
        rows, unread = prompts.read(file)
        unwritten = _PROMPTS[written_as](rows, target)
        what, count = "prompts", len(rows)
    lost = [f"{source}: {line}" for line in unread] + [f"{target}: {line}" for line in unwritten]
    return Converted(str(source), str(target), read_as, written_as, what, count, tuple(lost))


def read_circuit(path: str | PathLike[str], format: str | None = None, graph: Graph | None = None) -> Reading:
    """A circuit from a file of any format; see ``convert``. The reading's ``lost`` says what has no place in it."""
    file = File(Path(path))
    name = _told_apart(file) if format is None else format
    if name not in _CIRCUITS:
        raise PahqError(f"{path}: '{name}' is no format of circuits; known: {', '.join(_CIRCUITS)}")
    return _CIRCUITS[name].read(file, graph)


def write_circuit(circuit: Circuit, path: str | PathLike[str], format: str) -> list[str]:
    """Writes a circuit in a format of circuits; returns what it could not hold, one line each."""
    if format not in _CIRCUITS:
        raise PahqError(f"'{format}' is no format of circuits; known: {', '.join(_CIRCUITS)}")
    return _CIRCUITS[format].write(circuit, Path(path))


def _told_apart(file: File) -> str:
    if file.data[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise PahqError(
            f"{file.path}: is a pickle, which could run anything and is not read; save its content as JSON instead"
        )
    kind = prompts.kind_of(file)
    if kind is not None:
        return prompts.LINES if kind == prompts.TABLE else kind
    for name, format in _CIRCUITS.items():
        if format.matches(file):
            return name
    raise PahqError(
        f"{file.path}: its content is of none of the known formats ({', '.join(FORMATS)}); check it, or say --format"
    )


def _written_as(target: Path, read_as: str) -> str:
    ending = target.suffix.lower() if not target.is_dir() else ""
    if ending == ".json" and read_as in _PROMPTS:
        return prompts.AUTOCIRCUIT
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    raise PahqError(f"{target}: '{ending}' does not tell its format; say --to {', '.join(FORMATS)}")
