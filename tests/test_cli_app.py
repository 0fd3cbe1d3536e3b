"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import commands
from commands import Pahq
from pahq.cli.options import task_options


def options(files: Path, **more: object) -> list[object]:
    return commands.options(files, **{"threshold": 0.001, "metric": "kl_div", **more})


def test_help_comes_at_once() -> None:
    """Under half a second of work, the best of five: what else goes on on the machine is not what is measured."""

    def spent() -> float:
        now = os.times()
        return now.children_user + now.children_system

    seconds = []
    for _ in range(5):
        start = spent()
        done = subprocess.run([sys.executable, "-m", "pahq", "--help"], capture_output=True, text=True, check=True)
        seconds.append(spent() - start)
        for command in ("discover", "resume", "show", "tasks"):
            assert f"\n  {command} " in done.stdout
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize("words", [["--help"], ["discover", "--help"], ["tasks", "--help"], ["--version"], []])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert commands.help_without(["torch", "transformers", "numpy"], words)


def test_importing_the_package_is_light() -> None:
    code = "import sys, pahq; dir(pahq); assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_package_offers_its_names() -> None:
    import pahq

    assert callable(pahq.discover)
    assert callable(pahq.load_model)
    assert callable(pahq.get_task)
    assert issubclass(pahq.PahqError, Exception)
    assert pahq.Circuit.__name__ == "Circuit"
    with pytest.raises(AttributeError, match="discovery"):
        _ = pahq.discovery


def test_version(pahq: Pahq) -> None:
    assert pahq("--version").out == f"pahq {version('pahq')}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["find"], "No such command 'find'"),
        (["discover"], "Missing option '--model'"),
        (["discover", "--modle", "x"], "No such option: --modle"),
        (["discover", "--n", "many"], "Invalid value for '--n' / '-n': 'many' is not a valid integer (see 'pahq disc"),
        (["discover", "--threshold", "low"], "Invalid value for '--threshold': 'low' is not a valid number (see "),
        (["resume"], "Missing argument"),
        (["show"], "Missing argument"),
        (["show", "/absent"], "/absent: there is no finished run"),
    ],
)
def test_usage_errors_are_one_line(pahq: Pahq, words: list[str], message: str) -> None:
    assert pahq(*words).error.startswith(message)


def test_a_run_from_start_to_finish(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = pahq("discover", *options(files), "--out", out)
    assert first.code == 0, first.err
    for word in ("kl_div", "accuracy", "addition", "direct", "edges tested", "wasted", "peak", "largest edges"):
        assert word in first.out
    assert first.err.splitlines() == [f"loading {files / 'model'} …", "measuring the circuit …"]
    record = json.loads((out / "run.json").read_text())
    assert record["command"].startswith(f"pahq discover --model {files / 'model'}")
    assert record["config"]["n"] == 4

    before = {entry.name: entry.read_bytes() for entry in out.iterdir()}
    again = pahq("discover", *options(files), "--out", out)
    assert (again.code, again.out) == (0, "")
    assert "this run is finished; nothing was changed" in again.err
    resumed = pahq("resume", out)
    assert (resumed.code, resumed.out) == (0, "")
    assert "finished" in resumed.err
    assert {entry.name: entry.read_bytes() for entry in out.iterdir()} == before

    shown = pahq("show", out)
    assert shown.code == 0
    assert shown.out.strip() in first.out

    facts = json.loads(pahq("show", out, "--json").out)
    assert facts["size"]["tested"] == facts["search"]["tests"] == record["search"]["tests"]
    assert len(facts["largest_edges"]) == min(10, facts["size"]["addition"] + facts["size"]["direct"])

    refused = pahq("discover", *options(files, threshold=0.5), "--out", out)
    assert "holds another run (threshold is 0.001 there, 0.5 here)" in refused.error


def test_quiet_and_json(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    quiet = pahq("discover", *options(files), "--out", tmp_path / "a", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    both = pahq("discover", *options(files), "--out", tmp_path / "b", "--quiet", "--json")
    assert both.err == ""
    assert json.loads(both.out)["figures"]["validation"]["prompts"] == 4


def test_every_option_reaches_the_run(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    chosen = {
        "method": "acdc",
        "metric": "logit_diff",
        "n": 5,
        "seed": 3,
        "ablation": "mean",
        "head_order": "ascending",
        "sender_order": "earliest",
        "dtype": "float64",
        "device": "cpu",
    }
    flags = ["absolute", "no-split-qkv", "no-direct-edges", "split-pos", "fold-ln", "center-writing", "center-unembed"]
    flags += ["fold-value-biases"]
    words = [*options(files, **chosen), *(f"--{flag}" for flag in flags), "--out", tmp_path / "run", "-q"]
    words += ["--pad", "--task-option", "prepend_bos=false", "--full-vocabulary"]
    answer = pahq("discover", *words)
    assert answer.code == 0, answer.err
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config == {
        **chosen,
        "model": str(files / "model"),
        "task": str(files / "prompts.jsonl"),
        "threshold": 0.001,
        "task_options": {"prepend_bos": False},
        "full_vocabulary": True,
        **{flag.removeprefix("no-").replace("-", "_"): not flag.startswith("no-") for flag in flags},
        "pad": True,
        "policy": "fp32",
        "under_test": None,
        "exact": None,
        "check": False,
        "edges": None,
        "select": None,
        "method_options": {},
        "prefilter": None,
        "keep": None,
        "order_by_score": False,
    }


def test_options_of_precision_reach_the_run(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    words = ["--policy", "bf16", "--under-test", "sender", "--no-exact", "--check", "--streams", "low,high"]
    answer = pahq("discover", *options(files), *words, "--trace", tmp_path / "t.json", "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    chosen = {name: record["config"][name] for name in ("policy", "under_test", "exact", "check")}
    assert chosen == {"policy": "bf16", "under_test": "sender", "exact": False, "check": True}
    assert record["search"]["streams"] == ["low", "high"]
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert "policy bf16" in answer.out
    shown = json.loads(pahq("show", tmp_path / "run", "--json").out)
    assert shown["precision"] == record["precision"]

    (tmp_path / "run" / "run.json").unlink()
    again = pahq("resume", tmp_path / "run", "--streams", "none", "--trace", tmp_path / "again.json", "--quiet")
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["search"]["streams"] == []
    assert (tmp_path / "again.json").exists()


def test_the_folder_has_a_name_by_default(
    pahq: Pahq, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert pahq("discover", *options(files), "--quiet").code == 0
    assert (tmp_path / "runs" / "model-prompts-kl_div-0.001" / "run.json").exists()
    assert pahq("discover", *options(files), "--policy", "values:mlp=bf16", "--quiet").code == 0
    assert (tmp_path / "runs" / "model-prompts-kl_div-0.001-values_mlp_bf16" / "run.json").exists()


def test_a_reader_that_stops_reading_is_no_error(files: Path, tmp_path: Path, pahq: Pahq) -> None:
    assert pahq("discover", *options(files), "--out", tmp_path / "run", "-q").code == 0
    command = f"{sys.executable} -m pahq show {tmp_path / 'run'} | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"}
    )
    assert done.stderr == ""


def test_task_options_are_read_and_judged(pahq: Pahq) -> None:
    assert task_options(["templates=8", "prepend_bos=True", "path=a=b", "x=-1"]) == {
        "templates": 8,
        "prepend_bos": True,
        "path": "a=b",
        "x": -1,
    }
    refused = pahq("tasks", "show", "ioi", "--task-option", "templates")
    assert refused.code == 2
    assert refused.error == "task option 'templates' is not NAME=VALUE; write for example templates=8"
    assert "templates is 99; choose 1 to 8" in pahq("tasks", "show", "ioi", "--task-option", "templates=99").error
