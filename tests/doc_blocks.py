"""The code blocks of Markdown pages, and what running them gives.

* ``console``: lines that begin with ``$ `` are commands, the lines after each are what it prints on standard output;
* ``sh``: a script of commands whose output is not shown;
* ``python``: run in one namespace a page; a ``text`` block right after it is what it prints.

Shown output must be the real one, line by line: ``…`` in a line stands for any text, a line of ``…`` for any lines, and
numbers with a decimal point may be off by 1 % (processors sum in different orders). A comment before a block says what
is special about it: ``<!-- not run: needs a GPU -->``, ``<!-- exits with 2 -->``. One at the head of a page,
``<!-- after: quickstart.md -->``, names the pages whose files it builds on.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FENCE = re.compile(
    r"(?:^[ ]*<!-- (?P<note>[^\n]*?) -->\n)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
AFTER = re.compile(r"^<!-- after: (.*?) -->$", re.MULTILINE)
NUMBER = re.compile(r"(-?\d[\d,]*\.\d+(?:e[+-]?\d+)?)")
SHELL = re.compile(r"[|&;<>$`\\*?~]|^\w+=")
"""What only a shell understands."""


@dataclass(frozen=True)
class Block:
    """language: ``console``, ``sh``, ``python``, another or none. note: of the comment before it. line: its first."""

    page: Path
    line: int
    language: str
    body: str
    note: str = ""
    shown: str | None = None
    """For ``python``: what the ``text`` block after it says that it prints."""

    @property
    def where(self) -> str:
        return f"{self.page.name}, line {self.line}"

    @property
    def runnable(self) -> bool:
        return self.language in ("console", "sh", "python")

    @property
    def not_run(self) -> str | None:
        """The reason why it is not run, None where it is."""
        return self.note.removeprefix("not run: ") if self.note.startswith("not run: ") else None

    @property
    def exit_code(self) -> int:
        return int(self.note.removeprefix("exits with ")) if self.note.startswith("exits with ") else 0


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in FENCE.finditer(text):
        indent = match["indent"]
        body = "".join(line.removeprefix(indent) for line in match["body"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("language")) + 1
        block = Block(page, line, match["language"], body, match["note"] or "")
        if (
            block.language == "text"
            and found
            and found[-1].language == "python"
            and not text[end : match.start()].strip()
        ):
            found[-1] = Block(page, found[-1].line, "python", found[-1].body, found[-1].note, shown=body)
        else:
            found.append(block)
        end = match.end()
    return found


def steps_of(body: str) -> list[tuple[str, str]]:
    """(command, output shown) of a ``console`` block; a command goes on in the next line after a backslash."""
    steps: list[tuple[str, list[str]]] = []
    going_on = False
    for line in body.splitlines():
        if going_on:
            steps[-1] = (f"{steps[-1][0]}\n{line}", [])
        elif line.startswith("$ "):
            steps.append((line.removeprefix("$ "), []))
        elif steps:
            steps[-1][1].append(line)
        else:
            raise AssertionError(f"output before any command: {line}")
        going_on = bool(not steps[-1][1] and steps[-1][0].endswith("\\"))
    return [(command, "\n".join(shown)) for command, shown in steps]


def same(shown: str, real: str) -> bool:
    """Whether ``shown`` is what ``real`` is, by the rules of the module's text."""
    return _same(shown.strip().splitlines(), real.strip().splitlines())


def _same(shown: list[str], real: list[str]) -> bool:
    if not shown:
        return not real
    if shown[0].strip() == "…":
        return any(_same(shown[1:], real[start:]) for start in range(len(real) + 1))
    return bool(real) and _same_line(shown[0], real[0]) and _same(shown[1:], real[1:])


def _same_line(shown: str, real: str) -> bool:
    parts = [_skeleton(part) for part in " ".join(shown.split()).split("…")]
    pattern = "(?:.*?)".join(parts)
    match = re.fullmatch(pattern, " ".join(real.split()))
    if match is None:
        return False
    wanted = [_value(number) for number in NUMBER.findall(shown)]
    found = [_value(number) for number in match.groups()]
    return all(abs(a - b) <= max(0.01 * abs(a), 2e-3) for a, b in zip(wanted, found, strict=True))


def _skeleton(text: str) -> str:
    """A pattern for the text in which any number with a decimal point may stand where it has one."""
    return "".join(NUMBER.pattern if NUMBER.fullmatch(piece) else re.escape(piece) for piece in NUMBER.split(text))


def _value(number: str) -> float:
    return float(number.replace(",", ""))


@dataclass
class Runner:
    """Runs pages in one folder, each once."""

    root: Path
    """Where the pages lie."""
    folder: Path
    done: set[str] = field(default_factory=set)

    def run(self, page: Path) -> None:
        """Runs a page, and before it those that it builds on. Raises AssertionError naming the block that fails."""
        if page.name in self.done:
            return
        after = AFTER.search(page.read_text(encoding="utf-8"))
        for name in after[1].split(", ") if after else []:
            self.run(self.root / name)
        names: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks_of(page):
            if block.runnable and block.not_run is None:
                with contextlib.chdir(self.folder):
                    self._block(block, names)
        self.done.add(page.name)

    def _block(self, block: Block, names: dict[str, Any]) -> None:
        if block.language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block.body, block.where, "exec"), names)
            assert block.shown is None or same(block.shown, printed.getvalue()), (
                f"{block.where}: prints\n{printed.getvalue()}"
            )
            return
        steps = [(block.body, "")] if block.language == "sh" else steps_of(block.body)
        for command, shown in steps:
            code, out, err = _run(command)
            assert code == block.exit_code, f"{block.where}: {command}\nexits with {code}\n{out}{err}"
            assert not shown or same(shown, out), f"{block.where}: {command}\nprints\n{out}{err}"


def _run(command: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error. A plain ``pahq`` command runs here, where torch is loaded."""
    command = command.strip()
    if (
        command.startswith("pahq ")
        and not SHELL.search(command.replace("\\\n", " "))
        and "\n" not in command.replace("\\\n", "")
    ):
        return _here(shlex.split(command.replace("\\\n", " ")))
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", command],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout, done.stderr


def _here(words: list[str]) -> tuple[int, str, str]:
    from pahq.cli.app import main

    out, err, given = io.StringIO(), io.StringIO(), sys.argv
    code = 0
    try:
        sys.argv = words
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = given
    return code, out.getvalue(), err.getvalue()
