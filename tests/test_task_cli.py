"""``pahq tasks``."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pahq.cli.tasks import tasks_app
from pahq.errors import PahqError
from pahq.model import Transformer
from toy_tokenizers import byte_level, toy_model


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Transformer:
    model = toy_model(byte_level())
    import_module("pahq.inputs")  # which keeps the real load_model, and may not see this one first
    monkeypatch.setattr("pahq.model.load_model", lambda spec: model, raising=False)
    return model


def run(*arguments: str, colour: bool = False) -> str:
    environment = {"COLUMNS": "200"} | ({"NO_COLOR": "", "FORCE_COLOR": "1"} if colour else {"NO_COLOR": "1"})
    result = CliRunner().invoke(tasks_app, list(arguments), env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


def test_list() -> None:
    assert run() == run("list")
    lines = {line.split()[0]: line.split()[1] for line in run("list").splitlines() if line.strip()}
    assert lines["ioi"] == "logit_diff"
    assert lines["greaterthan"] == "greaterthan"
    assert {"docstring", "induction", "pronoun", "capital", "agreement"} <= set(lines)


def test_show_marks_what_differs(toy: Transformer) -> None:
    out = run("show", "ioi", "--n", "3")
    clean = [line for line in out.splitlines() if " clean " in line and "accuracy" not in line]
    assert len(clean) == 3
    assert all(line.count("[") == line.count("]") == 3 for line in clean)
    assert all("[ " in line for line in clean)
    assert "toy on 50 examples of split validation (seed 0), 15 tokens each" in out
    assert out.count("accuracy") == 2
    assert "\x1b" not in out


def test_show_in_colour(toy: Transformer) -> None:
    out = run("show", "ioi", "--n", "1", colour=True)
    assert "\x1b[1;32m" in out
    assert "[ " not in out


def test_show_json(toy: Transformer) -> None:
    report = json.loads(run("show", "docstring", "--n", "2", "--seed", "3", "--split", "test", "--json"))
    assert (report["examples"], report["seed"], report["split"], len(report["prompts"])) == (50, 3, "test", 2)
    for pair in report["prompts"]:
        assert pair["differ"] == [
            i for i, (a, b) in enumerate(zip(pair["clean"], pair["corrupt"], strict=True)) if a != b
        ]
        assert pair["read"] == [len(pair["clean"]) - 1]
        assert len(pair["answers"]) == 1
    for side in ("clean", "corrupt"):
        assert 0 <= report["accuracy"][side] <= 1


def test_show_every_task(toy: Transformer) -> None:
    for name in ("greaterthan", "induction", "pronoun", "capital", "agreement"):
        assert "logit difference" in run("show", name, "--n", "2")


def test_show_a_short_file(toy: Transformer, tmp_path: Path) -> None:
    rows = [
        {"clean": " Mary,", "corrupt": " Anna,", "answers": [" Mary"], "wrong_answers": [" Anna"]},
        {"clean": " Mary and", "corrupt": " Anna and", "answers": [" Mary"], "wrong_answers": [" Anna"]},
        {"clean": " Paul and Mary", "corrupt": " Luke and Mary", "answers": [" Mary"], "wrong_answers": [" Anna"]},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    out = run("show", str(path), "--n", "2", "--split", "all", "--pad")
    assert "on 2 examples" in out
    assert "on 1 example of" in run("show", str(path), "--n", "1", "--split", "all", "--pad")
    with pytest.raises(PahqError, match="line 3 has 3 tokens"):
        run("show", str(path), "--n", "2", "--split", "all")


def test_errors_reach_the_caller(toy: Transformer) -> None:
    for arguments, message in [
        (["show", "nothing"], "task 'nothing' is unknown"),
        (["show", "ioi", "--n", "0"], "number of examples is 0"),
        (["show", "ioi", "--split", "x"], "split 'x' is unknown"),
        (["show", "ioi", "--pad"], "option 'pad' is unknown"),
    ]:
        with pytest.raises(PahqError, match=message):
            run(*arguments)


def test_import_is_light() -> None:
    code = "import sys, pahq.cli.tasks; print([m for m in ('torch', 'transformers', 'rich.table') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_a_short_file_is_shown_whole(toy: Transformer, tmp_path: Path) -> None:
    """Who asks for no number is not refused for one."""
    names = ("Mary", "John", "Anna", "Paul", "Kate", "Mark", "Emma")
    row = {"corrupt": " Rose and Luke,", "answers": [" Jane"], "wrong_answers": [" Frank"]}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"clean": f" {name} and Luke,"} | row) + "\n" for name in names))
    for split, count in (("train", 3), ("validation", 2), ("test", 2), ("all", 5)):
        assert len(json.loads(run("show", str(path), "--split", split, "--json"))["prompts"]) == count
    with pytest.raises(PahqError, match=r"3 examples asked for, .* has 2 .*; ask for at most 2 \(n\) or add rows"):
        run("show", str(path), "--n", "3")
