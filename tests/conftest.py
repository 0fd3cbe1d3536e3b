"""Fixtures shared by several test files."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of converted models, for this test alone."""
    monkeypatch.setenv("PAHQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
