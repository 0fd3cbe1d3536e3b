"""The summary of a sweep as one HTML page: every run with its figures, its state, and links to its viewer and log.

Needs no network and no server. Whatever a name, a reason or a command holds is escaped: it can only be text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from pahq.files import encoded
from pahq.report.progress import as_time
from pahq.report.tables import Row, decimals, mebibytes, number

RELOAD = 10
"""Seconds after which the page of a sweep that goes on is loaded anew."""


@dataclass(frozen=True)
class Column:
    """key: of the rows; title: of the column; show: a value as text, None for words as they are."""

    key: str
    title: str
    show: Callable[[Any], str] | None = None


def _size(row: Row) -> str:
    return f"{row['edges_asked']} edges" if row.get("edges_asked") is not None else ""


WORDS = (
    Column("task", "task"),
    Column("model", "model"),
    Column("method", "method"),
    Column("policy", "policy"),
    Column("threshold", "threshold", number(6)),
    Column("metric", "metric"),
)
FIGURES = (
    Column("edges", "edges", "{:,}".format),
    Column("metric_circuit", "metric, used", decimals(3)),
    Column("recovered", "recovered, used", decimals(2)),
    Column("metric_circuit_test", "metric, held out", decimals(3)),
    Column("recovered_test", "recovered, held out", decimals(2)),
    Column("accuracy_test", "accuracy, held out", decimals(2)),
    Column("total_seconds", "time", as_time),
    Column("host_bytes", "memory, MiB", mebibytes),
)
NOTES = (
    "metric: the circuit's, as minimised, on the prompts used and on held-out ones. recovered: (m(circuit) − "
    "m(corrupted prompts)) / (m(model) − m(corrupted prompts)). pahq evaluate adds intervals, random circuits and ROC."
)


def page(record: dict[str, Any], written: str) -> bytes:
    """The page of a sweep's record (``status.SweepFolder.record``). written: the time, as text."""
    rows: Sequence[Row] = record["runs"]
    going = record["finished"] is None
    columns = (Column("state", "state"), *WORDS, *_present(rows))
    first, *others = map(_head, columns)
    heads = "".join([first, '<th class="plain" scope="col">see</th>', *others])
    style, script = _part("page.css"), _part("page.js")
    # No script but this very one runs, whatever got into the page.
    sure = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{sure}'; style-src 'unsafe-inline'"
    title = f"Sweep: {record['name']}"
    options = "".join(f'<option value="{c.key}">{escape(c.title)}</option>' for c in columns)
    text = f"""<!doctype html>
<html lang="en"{f' data-reload="{RELOAD}"' if going else ""}>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>{escape(_told(record))}</p>
{_bar(record["counts"])}
<p class="soft"><code>{escape(record["command"])}</code></p>
<p class="soft">{escape(_times(record, written))} · <a href="sweep.csv">sweep.csv</a> · \
<a href="sweep.json">sweep.json</a></p>
<div id="controls">
<input id="search" type="search" placeholder="search" aria-label="search">
{_choices(record["counts"])}
<span id="order"><label>sort <select><option value="">as run</option>{options}</select></label>
<button type="button" aria-label="other way round">▲</button></span>
</div>
<div class="wide"><table>
<thead><tr>{heads}</tr></thead>
<tbody>
{"".join(_row(row, columns) for row in rows)}</tbody>
</table></div>
<p id="none" hidden>no run matches</p>
<p class="notes">{escape(NOTES)}</p>
<script>{script}</script>
</body>
</html>
"""
    return encoded(text)


def _part(name: str) -> str:
    return files("pahq.sweeps").joinpath(name).read_text("utf-8").strip()


def _present(rows: Sequence[Row]) -> list[Column]:
    """Columns of figures; that of a device's memory only where a run had one."""
    device = [Column("device_bytes", "device, MiB", mebibytes)]
    return [*FIGURES, *(device if any(row.get("device_bytes") is not None for row in rows) else [])]


def _told(record: dict[str, Any]) -> str:
    counts = {state: count for state, count in record["counts"].items() if count}
    total = sum(counts.values())
    return f"{total:,} run{'s' if total != 1 else ''}: " + ", ".join(
        f"{count:,} {state}" for state, count in counts.items()
    )


def _times(record: dict[str, Any], written: str) -> str:
    versions = record["versions"]
    end = f"as of {_time(written)}" if record["finished"] is None else f"ended {_time(record['finished'])}"
    return f"began {_time(record['started'])}, {end} · pahq {versions['pahq']}, torch {versions['torch']}"


def _time(stamp: str) -> str:
    return stamp.replace("T", " ").replace("+00:00", " UTC")


def _bar(counts: dict[str, int]) -> str:
    parts = [
        f'<i class="{state}" style="flex: {counts[state]}" title="{counts[state]} {state}"></i>'
        for state in ("done", "failed", "running", "interrupted", "waiting")
        if counts[state]
    ]
    return f'<div class="bar">{"".join(parts)}</div>'


def _choices(counts: dict[str, int]) -> str:
    return "\n".join(
        f'<button type="button" data-state="{state}" aria-pressed="false">{count:,} {state}</button>'
        for state, count in counts.items()
        if count
    )


def _head(column: Column) -> str:
    kind = ' class="figure"' if column.show is not None else ""
    return (
        f'<th scope="col" data-key="{column.key}"{kind} aria-sort="none">'
        f'<button type="button">{escape(column.title)}</button></th>'
    )


def _row(row: Row, columns: Sequence[Column]) -> str:
    known = [column.key for column in columns]
    data = {key: "" if row.get(key) is None else str(row[key]) for key in known}
    text = " ".join(str(row.get(key) or "") for key in ("run", "state", "reason", *(c.key for c in WORDS)))
    facts = "".join(f' data-{key}="{escape(value)}"' for key, value in data.items())
    state, run = escape(row["state"]), escape(row["run"])
    cells = [f'<td class="state {state}" data-run="{run}" title="{run}">{state}</td>']
    cells += [_links(row), *(_cell(row, column) for column in WORDS)]
    figures = columns[1 + len(WORDS) :]
    if row["state"] == "done":
        cells += [_cell(row, column) for column in figures]
    else:
        cells.append(f'<td class="why" colspan="{len(figures)}">{escape(row.get("reason") or "")}</td>')
    return f'<tr{facts} data-text="{escape(text.lower())}" id="{run}">{"".join(cells)}</tr>\n'


def _cell(row: Row, column: Column) -> str:
    value = row.get(column.key)
    if column.key == "threshold" and value is None:
        shown = _size(row)
    elif value is None:
        shown = ""
    else:
        shown = str(value) if column.show is None else column.show(value)
    kind = f'word" title="{escape(shown)}' if column.show is None else "figure"  # long names are cut short
    return f'<td class="{kind}" data-title="{escape(column.title)}">{escape(shown)}</td>'


def _links(row: Row) -> str:
    links = [(row.get(name), name) for name in ("viewer", "log")]
    if row["state"] == "waiting":
        links = []
    made = [f'<a href="{escape(quote(to))}">{name}</a>' for to, name in links if to]
    return f'<td class="links">{"".join(made)}</td>'
