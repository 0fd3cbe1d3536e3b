"""A circuit as it shows itself in a notebook, and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from pahq.errors import PahqError

if TYPE_CHECKING:
    from pahq.evaluation.circuit import Circuit, Edge

SHOWN = 10
"""Edges in the summary."""
KINDS = {"q": "queries", "k": "keys", "v": "values", "qkv": "queries, keys, values", "mlp": "MLPs", "logits": "logits"}
OPTIONS = ("task", "method", "metric", "threshold", "edges", "policy")
"""What of a run's options the summary shows."""
ROWS = ("kept", "tested", "all")
_CELL = "padding:.15em .7em;text-align:"


def html(circuit: Circuit) -> str:
    """A small summary: sizes by the kind of receiver, and the edges of largest effect. All text is escaped."""
    graph = circuit.graph
    config = circuit.metadata.get("config")
    config = config if isinstance(config, dict) else {}
    facts = ", ".join(f"{name} {config[name]}" for name in OPTIONS if config.get(name) is not None)
    parts = (slice(None, graph.direct), graph.direct)
    kinds = []
    for kind, title in KINDS.items():
        rows = [row for row, receiver in enumerate(graph.receivers) if receiver.kind == kind]
        if rows:
            kept, there = circuit.mask[rows], graph.edges[rows]
            kinds.append([f"into {title}", *(_share(kept[:, part], there[:, part]) for part in parts)])
    kinds.append(["all", *(_share(circuit.mask[:, part], graph.edges[:, part]) for part in parts)])
    head = f"<strong>Circuit of {escape(graph.config.name)}</strong>" + (f" ({escape(facts)})" if facts else "")
    largest = [[f"{edge.sender} → {edge.receiver}", _number(edge), str(edge.order)] for edge in circuit.largest(SHOWN)]
    shown = [head, _table(["edges kept", "addition", "direct"], kinds)]
    if largest:
        shown.append(_table(["largest effects", "effect", "tested as no."], largest))
    return f"<div>{''.join(shown)}</div>"


def dataframe(circuit: Circuit, rows: str = "kept") -> Any:
    """See ``Circuit.to_dataframe``."""
    if rows not in ROWS:
        raise PahqError(f"dataframe: rows '{rows}' is unknown; known: {', '.join(ROWS)}")
    try:
        import pandas
    except ImportError:
        raise PahqError("dataframe: pandas is not installed; install it with: pip install 'pahq[notebook]'") from None
    graph = circuit.graph
    which = {"kept": circuit.mask, "tested": circuit.order >= 0, "all": graph.edges}[rows]
    at, columns = np.nonzero(which)
    # In the order of the tests; what was never tested comes last, from the output back to the input.
    order = circuit.order[at, columns]
    by = np.lexsort((-columns, -at, np.where(order < 0, np.iinfo(np.int64).max, order)))
    at, columns = at[by], columns[by]
    return pandas.DataFrame(
        {
            "sender": [graph.sender_name(column) for column in columns.tolist()],
            "receiver": [graph.receivers[row].name for row in at.tolist()],
            "kind": ["direct" if column == graph.direct else "addition" for column in columns.tolist()],
            "input": [graph.receivers[row].kind for row in at.tolist()],
            "kept": circuit.mask[at, columns],
            "effect": circuit.effects[at, columns],
            "order": circuit.order[at, columns],
        }
    )


def _share(kept: np.ndarray, there: np.ndarray) -> str:
    return f"{int(kept.sum()):,} of {int(there.sum()):,}" if there.any() else "–"


def _number(edge: Edge) -> str:
    return "–" if math.isnan(edge.effect) else f"{edge.effect:.4g}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return f"<table>{''.join(_lines([header], 'th'))}{''.join(_lines(rows, 'td'))}</table>"


def _lines(rows: list[list[str]], tag: str) -> Iterator[str]:
    """Rows of a table, the first cell left, numbers right."""
    for row in rows:
        cells = (
            f'<{tag} style="{_CELL}{"right" if i else "left"}">{escape(cell)}</{tag}>' for i, cell in enumerate(row)
        )
        yield f"<tr>{''.join(cells)}</tr>"
