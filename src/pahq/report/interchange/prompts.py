"""Prompt pairs: AutoCircuit's JSON (``{"prompts": [{clean, corrupt, answers, wrong_answers}]}``) and our JSON lines.

EAP-IG's CSV tables are read, too. Source of the format: Miller et al. 2024 (AutoCircuit).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.files import write_atomic
from pahq.report.interchange.files import File
from pahq.task.files import COLUMNS, LABEL, LAST_YEAR, SUFFIXES, Row, read_rows

AUTOCIRCUIT, LINES, TABLE = "autocircuit", "prompts", "table"


def kind_of(file: File) -> str | None:
    """Which kind of prompt file it is, by its content; None for none."""
    if file.is_folder:
        return None
    content = file.json
    if isinstance(content, dict) and isinstance(content.get("prompts"), list):
        return AUTOCIRCUIT
    if isinstance(content, list) and content and all(isinstance(row, dict) and "clean" in row for row in content):
        return AUTOCIRCUIT
    lines = file.json_lines
    if lines is not None and all("clean" in line for line in lines):
        return LINES
    header = next(csv.reader(io.StringIO(file.text)), []) if file.text else []
    return TABLE if "clean" in [cell.strip() for cell in header] else None


def read(file: File) -> tuple[list[Row], list[str]]:
    """The prompt pairs, and what else is in the file, one line each. Raises PahqError for whatever is wrong in it."""
    if file.path.suffix.lower() not in SUFFIXES:
        raise PahqError(f"{file.path}: prompt files end in {', '.join(SUFFIXES)}; rename it")
    rows = read_rows(file.path)
    known = {name for names in COLUMNS.values() for name in names} | {LABEL}
    lost = []
    content = file.json
    if isinstance(content, dict) and "prompts" in content:
        more = [name for name in content if name != "prompts"]
        if more:
            lost.append(f"beside the prompts: {', '.join(more)}")
        content = content["prompts"]
    content = content if isinstance(content, list) else file.json_lines
    if content is not None:
        names = {name for row in content if isinstance(row, dict) for name in row}
    else:
        names = {cell.strip() for cell in next(csv.reader(io.StringIO(file.text)), [])}
    more = sorted(name for name in names - known if name)
    if more:
        lost.append(f"of each prompt: {', '.join(more)}")
    if any(row.year is None for row in rows) and LABEL in names:
        lost.append(f"of each prompt: {LABEL} (there are answers)")
    return rows, lost


def write_autocircuit(rows: Sequence[Row], path: Path) -> list[str]:
    """Writes AutoCircuit's JSON; returns what it could not hold."""
    lost = []
    if any(row.year is not None for row in rows):
        lost.append("labels: they are written out as answers, the two digits of all later years and of all others")
    ids = sum(any(isinstance(answer, int) for answer in (*row.answers, *row.wrong)) for row in rows)
    if ids:
        lost.append(
            f"that answers are token ids in {ids:,} prompts: AutoCircuit takes ids only where its prompts are ids, too"
        )
    _write(path, json.dumps({"prompts": [_years(row) for row in rows]}, indent=1, ensure_ascii=False) + "\n")
    return lost


def write_lines(rows: Sequence[Row], path: Path) -> list[str]:
    """Writes one JSON object a line, which holds everything."""
    _write(path, "".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows))
    return []


def _write(path: Path, text: str) -> None:
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise PahqError(f"{path}: a prompt holds half a character ({error.reason}); mend the prompts") from None
    write_atomic(path, data)


def _plain(row: Row) -> dict[str, Any]:
    pair = {"clean": row.clean, "corrupt": row.corrupt}
    if row.year is not None:
        return pair | {LABEL: f"{row.year:02}"}
    return pair | {"answers": list(row.answers), "wrong_answers": list(row.wrong)}


def _years(row: Row) -> dict[str, Any]:
    if row.year is None:
        return _plain(row)
    later, others = range(row.year + 1, LAST_YEAR + 2), range(row.year + 1)
    sides = {"answers": [f"{year:02}" for year in later], "wrong_answers": [f"{year:02}" for year in others]}
    return {"clean": row.clean, "corrupt": row.corrupt} | sides
