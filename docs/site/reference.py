"""A hook of mkdocs: the reference of all commands, made from the command line itself when the site is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PLACE = "<!-- commands -->"
"""Where the reference goes, in any page."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page, with the reference in its place. Called by mkdocs."""
    return markdown.replace(PLACE, reference()) if PLACE in markdown else markdown


def reference() -> str:
    """Markdown about every command: what it does, its usage, its arguments and options."""
    return "\n\n".join(_section(name, context) for name, context in commands())


def commands() -> Iterator[tuple[str, Any]]:
    """(name, context) of every command that does something, such as ``pahq tasks show``, in the order of the help."""
    import typer

    from pahq.cli.app import app

    def walk(command: Any, name: str, parent: Any) -> Iterator[tuple[str, Any]]:
        context = typer.Context(command, info_name=name.rpartition(" ")[2], parent=parent)
        below = getattr(command, "commands", None)
        if below is None:
            yield name, context
        else:
            for word, inner in below.items():
                yield from walk(inner, f"{name} {word}", context)

    yield from walk(typer.main.get_command(app), "pahq", None)


def _section(name: str, context: Any) -> str:
    command = context.command
    usage = command.get_usage(context).removeprefix("Usage: ")
    parts = [f"## {name}", _text(command.help), f"```text\n{usage}\n```"]
    for title, kind in (("Argument", "argument"), ("Option", "option")):
        rows = [record for p in command.params if p.param_type_name == kind and (record := p.get_help_record(context))]
        rows += [("-h, --help", "Show this message and exit.")] if kind == "option" else []
        if rows:
            lines = [f"| {_code(left)} | {_cell(right)} |" for left, right in rows]
            parts.append("\n".join([f"| {title} | |", "|---|---|", *lines]))
    if command.epilog:
        parts.append(f"```text\n{command.epilog.strip()}\n```")
    return "\n\n".join(parts)


def _text(help: str | None) -> str:
    """Help without the marks by which its layout is kept on a terminal."""
    return _escaped((help or "").replace("\b", "").replace("\f", "").strip())


def _cell(text: str) -> str:
    return _escaped(" ".join(text.split())).replace("|", "\\|")


def _code(text: str) -> str:
    text = text.replace("|", "\\|")
    return f"`{text}`"


def _escaped(text: str) -> str:
    for mark in "\\`*_[]<>":
        text = text.replace(mark, f"\\{mark}")
    return text
