"""Runs the command line inside the test's own process, where torch is imported already."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tiny import save_model, save_prompts


@dataclass(frozen=True)
class Answer:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a failed command leaves; fails if it is not exactly that (and with --json a document)."""
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        news = [line for line in lines if line.endswith("…")]
        assert self.code == 2, (self.code, self.err)
        assert len(errors) == 1, self.err
        if self.out:
            told = {"kind": "refused", "code": 2, "message": errors[0].removeprefix("error: ")}
            assert json.loads(self.out) == {"error": told}
        assert len(errors) + len(news) == len(lines), self.err
        return errors[0].removeprefix("error: ")


Pahq = Callable[..., Answer]


def make(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Pahq:
    """``pahq("show", folder)`` runs that command."""
    from pahq.cli.app import main

    def pahq(*words: object) -> Answer:
        monkeypatch.setattr("sys.argv", ["pahq", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return Answer(int(end.value.code or 0), out, err)

    return pahq


def small_files(folder: Path) -> Path:
    """The folder, with a tiny ``model`` and ``prompts.jsonl`` in it."""
    save_model(folder / "model", layers=2, heads=2)
    save_prompts(folder / "prompts.jsonl")
    return folder


def two_runs(folder: Path) -> Path:
    """The folder, with ``small_files`` and their runs ``loose`` and ``tight``: logit_diff at 0.1 and 0.01."""
    import pahq
    from pahq.report import machine

    small_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "gemm_peak", lambda *_: 1e11)
        for name, threshold in (("loose", 0.1), ("tight", 0.01)):
            model, prompts = str(folder / "model"), str(folder / "prompts.jsonl")
            pahq.discover(model, prompts, threshold, metric="logit_diff", n=3, out=folder / name)
    return folder


def options(files: Path, **more: object) -> list[object]:
    """Options of ``pahq discover`` on these files, as words; an underscore in a name stands for a hyphen."""
    given = {"model": files / "model", "task": files / "prompts.jsonl", "n": 4} | more
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]


def help_without(modules: Sequence[str], words: Sequence[str]) -> str:
    """What a command prints in a process of its own, in which none of these modules may be imported."""
    code = (
        "import sys\n"
        f"sys.argv = ['pahq', *{list(words)!r}]\n"
        "from pahq.cli.app import main\n"
        "try: main()\n"
        f"finally: assert not set({list(modules)!r}) & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
