"""Fixtures shared by several test files."""

from __future__ import annotations

import os

# Tests' models are tiny: threads inside their products cost more than they give, and get in the way of the tests'
# own worker threads. Set before torch is imported, so that processes which tests start have it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from commands import Pahq

# A shell's background jobs ignore Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of converted models, for this test alone."""
    monkeypatch.setenv("PAHQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pahq(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Pahq:
    """The command line: ``pahq("show", folder)``. The machine's peak, half a second a run, is not measured."""
    import commands
    from pahq.report import machine

    monkeypatch.setattr(machine, "gemm_peak", lambda *_: 1e11)
    return commands.make(capsys, monkeypatch)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny ``model`` and ``prompts.jsonl`` in it, one for each file of tests."""
    import commands

    return commands.small_files(tmp_path_factory.mktemp("files"))
