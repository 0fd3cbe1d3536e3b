"""Runs the command line inside the test's own process, where torch is imported already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Answer:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a failed command leaves; fails if it is not exactly that."""
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        news = [line for line in lines if line.endswith("…")]
        assert self.code == 2, (self.code, self.err)
        assert self.out == ""
        assert len(errors) == 1, self.err
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
