"""Prompt pairs from the user's own file: JSONL, CSV, or a JSON object with a list ``prompts``.

Nothing in a file is executed: lists in CSV cells are read as JSON or as Python literals.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pahq.errors import PahqError

SUFFIXES = (".jsonl", ".csv", ".json")
COLUMNS: dict[str, tuple[str, ...]] = {
    "clean": ("clean",),
    "corrupt": ("corrupt", "corrupted"),
    "answers": ("answers", "correct_idx"),
    "wrong_answers": ("wrong_answers", "incorrect_idx"),
}
"""What a row has, and the names under which it is found. Metrics that need wrong answers refuse prompts without."""
SIDES = ("answers", "wrong_answers")
LABEL = "label"
"""In place of answers, in tables of greater-than prompts: the two digits that end the prompt's year."""
LAST_YEAR = 98
"""The last label that has later years in its century."""
MISSPELT = 0.75
"""How near (1: the same) a name must be to a column's to be taken for a slip; other names are the user's own notes."""


@dataclass(frozen=True)
class Row:
    """One prompt pair of a file. where: its place in the file, for messages; ints among the answers are token ids.

    year: the last two digits of the prompt's year, where these stand for the answers: all later ones are right.
    """

    where: str
    clean: str
    corrupt: str
    answers: tuple[str | int, ...]
    wrong: tuple[str | int, ...]
    year: int | None = None


def read_rows(path: Path) -> list[Row]:
    """All prompt pairs of the file. Raises PahqError, with the line, for whatever is wrong in it."""
    readers = {".jsonl": _jsonl, ".csv": _csv, ".json": _json}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PahqError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise PahqError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None
    if not text.strip():
        raise PahqError(f"{path}: the file is empty; give at least one prompt pair")
    rows = [_row(path, where, fields) for where, fields in readers[path.suffix.lower()](path, text)]
    if not rows:
        raise PahqError(f"{path}: there is no prompt pair in it; give at least one")
    return rows


def _load_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PahqError(f"{where}: broken JSON ({error.msg} at column {error.colno}); mend it") from None
    except RecursionError:
        raise PahqError(f"{where}: JSON nested too deeply; give an object with clean, corrupt, …") from None


def _jsonl(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    lines = text.split("\n")  # not splitlines: JSON strings may hold other line separators
    if not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        where = f"line {number}"
        if not line.strip():
            raise PahqError(f"{path}: {where} is empty; remove it")
        yield where, _load_json(line, f"{path}: {where}")


def _json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise PahqError(f"{path}: line {error.lineno}: broken JSON ({error.msg}); mend it") from None
    except RecursionError:
        raise PahqError(f'{path}: JSON nested too deeply; give {{"prompts": [...]}}') from None
    prompts = content.get("prompts") if isinstance(content, dict) else content
    if not isinstance(prompts, list):
        raise PahqError(f'{path}: no list of prompts in it; give {{"prompts": [{{"clean": ..., ...}}, ...]}}')
    for number, fields in enumerate(prompts, 1):
        yield f"prompt {number}", fields


def _csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = f"line {line}", reader.line_num + 1
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_names(path, where, header)
                continue
            if not cells:
                raise PahqError(f"{path}: {where} is empty; remove it")
            if len(cells) != len(header):
                raise PahqError(f"{path}: {where} has {len(cells)} cells, but the header has {len(header)}; mend it")
            fields: dict[str, Any] = dict(zip(header, cells, strict=True))
            for name in (name for side in SIDES for name in COLUMNS[side]):
                if name in fields:
                    fields[name] = _cell(fields[name], f"{path}: {where}: {name}", ids=name.endswith("_idx"))
            yield where, fields
    except csv.Error as error:
        raise PahqError(f"{path}: line {reader.line_num}: broken CSV ({error}); mend it") from None


def _cell(cell: str, where: str, ids: bool) -> Any:
    """A CSV cell with one answer, or a list of them in JSON or Python notation; ids: with token ids."""
    text = cell.strip()
    if not text.startswith("["):
        if not ids:
            return cell
        try:
            return int(text)
        except ValueError:
            raise PahqError(f"{where}: '{cell}' is no token id; give a whole number or a list of them") from None
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise PahqError(f"{where}: '{cell}' is no list; write for example [\" Mary\"]")


def _row(path: Path, where: str, fields: Any) -> Row:
    if not isinstance(fields, dict):
        raise PahqError(f"{path}: {where} is no object; give one with {', '.join(COLUMNS)}")
    _check_names(path, where, fields)
    labelled = LABEL in fields and not any(name in fields for side in SIDES for name in COLUMNS[side])
    found: dict[str, Any] = {}
    for column, names in COLUMNS.items():
        if labelled and column in SIDES:
            continue
        name = next((name for name in names if name in fields), None)
        if name is None and column == "wrong_answers":
            found[column] = []
            continue
        if name is None:
            raise PahqError(f"{path}: {where} has no '{column}'; a row needs clean, corrupt and answers")
        found[column] = fields[name]
    for column in ("clean", "corrupt"):
        if not isinstance(found[column], str) or not found[column]:
            raise PahqError(f"{path}: {where}: '{column}' is {found[column]!r}; give a text")
    if labelled:
        return Row(where, found["clean"], found["corrupt"], (), (), _year(path, where, fields[LABEL]))
    sides = []
    for column in SIDES:
        value = found[column]
        values = value if isinstance(value, list | tuple) else [value]
        for answer in values:
            if isinstance(answer, bool) or not isinstance(answer, str | int) or answer == "":
                raise PahqError(f"{path}: {where}: '{column}' holds {answer!r}; give texts or token ids")
        sides.append(tuple(values))
    if not sides[0]:
        raise PahqError(f"{path}: {where} has no answers; give at least one")
    return Row(where, found["clean"], found["corrupt"], sides[0], sides[1])


def _check_names(path: Path, where: str, names: Iterable[str]) -> None:
    """Raises PahqError for a name that is all but one which the row lacks.

    What is only like a name that is there (EAP-IG's ``corrupted_hard`` beside ``corrupted``) is left alone.
    """
    names = set(names)
    column_of = {name: column for column, known in COLUMNS.items() for name in known} | {LABEL: LABEL}
    there = {column_of[name] for name in names & column_of.keys()}
    if "answers" in there:
        there.add(LABEL)
    for name in sorted(names - column_of.keys()):
        near = get_close_matches(name.lower(), column_of, n=1, cutoff=MISSPELT)
        if near and column_of[near[0]] not in there:
            raise PahqError(f"{path}: {where}: '{name}' is unknown; did you mean '{near[0]}'?")


def _year(path: Path, where: str, label: Any) -> int:
    """The two digits that a label gives, as text or as a number."""
    text = str(label).strip()
    if isinstance(label, bool) or not re.fullmatch(r"[0-9]{1,2}", text) or int(text) > LAST_YEAR:
        raise PahqError(
            f"{path}: {where}: '{LABEL}' is {label!r}, not the last two digits of a year (00 to {LAST_YEAR}); "
            f"give them, or columns {' and '.join(SIDES)} instead"
        )
    return int(text)
