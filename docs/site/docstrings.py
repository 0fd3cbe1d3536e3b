"""An extension of griffe: what a docstring says about each parameter becomes an item of a list in the reference.

Docstrings here are prose in which ``name: what it is`` tells about a parameter or a field, several in a line at times.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

NAMES = re.compile(r"(?:^|(?<=[.;:)] )|(?<=^\* ))(\w+(?:, \w+)*): ", re.MULTILINE)


class Parameters(griffe.Extension):
    """Turns the docstrings of functions and classes while they are loaded."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        _turn(func, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        names = {name for name, member in cls.members.items() if member.is_attribute}
        start = cls.members.get("__init__")
        if isinstance(start, griffe.Function):
            names |= {parameter.name for parameter in start.parameters}
        _turn(cls, names)


def _turn(thing: Any, names: set[str]) -> None:
    if thing.docstring is not None:
        thing.docstring.value = listed(thing.docstring.value, names)


def listed(text: str, names: set[str]) -> str:
    """Markdown of a docstring, in which every ``name: …`` about one or several of ``names`` is an item of a list."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.lstrip().startswith((">>>", "* ", "|")) or paragraph.startswith("    "):
            paragraphs.append(paragraph)
            continue
        joined = " ".join(line.strip() for line in paragraph.splitlines())
        pieces, last = [], 0
        for found in NAMES.finditer(joined):
            if set(found[1].split(", ")) <= names:
                pieces.append(joined[last : found.start()].strip())
                last = found.start()
        pieces.append(_cut(joined[last:].strip()) if last or NAMES.match(joined) else joined)
        items = []
        for piece in filter(None, pieces):
            start = NAMES.match(piece)
            if start and set(start[1].split(", ")) <= names:
                about = ", ".join(f"`{name}`" for name in start[1].split(", "))
                items.append(f"* {about}: {piece[start.end() :].removesuffix(';')}")
            else:
                items.append(("\n" if items else "") + piece + "\n")
        paragraphs.append("\n".join(items))
    return "\n\n".join(paragraphs)


def _cut(piece: str) -> str:
    """The last item, and what is said after it about errors or sources as a paragraph of its own."""
    return re.sub(r" (Raises |Sources?: )", r"\n\n\1", piece, count=1)
