"""The documentation: every command shown runs and prints what is shown, and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from doc_blocks import AFTER, Runner, blocks_of, same, steps_of

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
REASONS = (
    "a template: ",
    "needs a GPU",
    "needs the model hub",
    "needs an account",
    "takes minutes",
    "changes your shell",
)
"""Why a block may not run here. Each needs one of these, and says so in the page's source."""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(DOCS, tmp_path_factory.mktemp("docs"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows(page: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("WANDB_MODE", "offline")
    runner.run(page)


def test_what_the_readme_shows(runner: Runner) -> None:
    readme = ROOT / "README.md"
    if not any(block.note for block in blocks_of(readme)):
        pytest.skip("README.md does not say which of its blocks take minutes")
    runner.run(readme)


def test_figures_of_methods_are_those_of_the_benchmark() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "truth.json").read_text())["details"]["table"]
    areas: dict[str, list[float]] = {}
    for row in rows:
        if row["setting"].startswith("trained-"):
            areas.setdefault(row["method"], []).append(row["auc_edges"])
    table = (DOCS / "choosing.md").read_text().partition("| method | AUC |")[2].partition("\n\n")[0]
    shown = re.findall(r"^\| `([\w-]+)`(?: with `--policy ([\w-]+)`)? \| (\d\.\d{3}) \|", table, re.MULTILINE)
    assert len(shown) == 10
    for method, policy, area in shown:
        found = areas[policy or method]
        assert abs(sum(found) / len(found) - float(area)) < 6e-4, (policy or method, found)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_blocks_that_are_not_run_say_why(page: Path) -> None:
    for block in blocks_of(page):
        if block.not_run is not None:
            assert block.not_run.startswith(REASONS), f"{block.where}: '{block.not_run}' is not one of {REASONS}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_text_that_renders_alike_everywhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("```") % 2 == 0
    long = [line for line in text.splitlines() if len(line) > 240 and not line.startswith("|")]
    assert not long, "a line is too long to be reviewed"
    for target in re.findall(r"!?\[[^\]]*\]\(([^)#\s]+)[^)]*\)", text):
        assert target.startswith("https://") or (DOCS / target).is_file(), target
    for name in AFTER.findall(text):
        assert all((DOCS / part).is_file() for part in name.split(", "))
    for block in blocks_of(page):
        assert block.language, f"{block.where}: say what language it is"


def test_pictures_are_small_and_used() -> None:
    used = {name for page in PAGES for name in re.findall(r"\(pictures/([^)]+)\)", page.read_text(encoding="utf-8"))}
    there = {path.name: path.stat().st_size for path in (DOCS / "pictures").iterdir()}
    assert used == set(there)
    assert all(size < 300_000 for size in there.values()), there


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_page_and_fetches_nothing(site: Path) -> None:
    for page in PAGES:
        text = (site / f"{page.stem}.html").read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:link|script|img|iframe)\b[^>]*?(?:href|src)="?([^"\s>]+)', text)
        assert fetched
        assert not [target for target in fetched if re.match(r"(?:https?:)?//", target)], page
    assert not list(site.rglob("*.py"))


def test_the_reference_has_every_command_and_option(site: Path) -> None:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "site" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    text = (site / "cli.html").read_text(encoding="utf-8")
    found = list(hook.commands())
    assert len(found) > 15
    for name, context in found:
        assert re.search(rf"<h2[^>]*>{name}<", text), name
        for option in context.command.params:
            for word in option.opts if option.param_type_name == "option" else []:
                assert word in text, (name, word)


def test_the_reference_of_python_has_every_public_name(site: Path) -> None:
    import pahq

    text = (site / "api.html").read_text(encoding="utf-8")
    for name in pahq.__all__:
        assert re.search(rf'<h3 id="pahq[\w.]*\.{name}"', text), name


@pytest.mark.parametrize(
    ("shown", "real", "expected"),
    [
        ("kept 22 edges", "kept 22  edges", True),
        ("kept 22 edges", "kept 23 edges", False),
        ("loss 1.000 (3)", "loss 1.004 (3)", True),
        ("loss 1.000", "loss 1.040", False),
        ("loss -1.000", "loss 1.000", False),
        ("a\n…\nd", "a\nb\nc\nd", True),
        ("a\n…\nd", "a\nb\nc", False),
        ("in … done", "in 0:07 done", True),
        ("a", "a\nb", False),
        ("", "a", False),
    ],
)
def test_shown_output_is_compared_line_by_line(shown: str, real: str, expected: bool) -> None:
    assert same(shown, real) is expected


def test_blocks_are_found_with_their_notes_and_output(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: needs a GPU -->\n```console\n$ pahq a \\\n    b\nout\n$ c\n```\n\n"
        "```python\nprint(1)\n```\n\n```text\n1\n```\n- x\n  ```sh\n  ls\n  ```\n"
    )
    first, second, third = blocks_of(page)
    assert (first.not_run, first.line) == ("needs a GPU", 2)
    assert steps_of(first.body) == [("pahq a \\\n    b", "out"), ("c", "")]
    assert (second.body, second.shown, second.not_run) == ("print(1)\n", "1\n", None)
    assert (third.language, third.body) == ("sh", "ls\n")


def test_a_block_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("```console\n$ false\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, line 1: false"):
        Runner(tmp_path, tmp_path).run(tmp_path / "page.md")
    (tmp_path / "other.md").write_text("```python\nprint(1)\n```\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match=r"other\.md, line 1"):
        Runner(tmp_path, tmp_path).run(tmp_path / "other.md")
