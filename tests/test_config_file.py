"""``--config`` repeats a run from its record, flags override it, faults of a file are one line; completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import commands
from commands import Pahq
from pahq.cli import codes
from pahq.report import machine


@pytest.fixture
def pahq(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Pahq:
    monkeypatch.setattr(machine, "gemm_peak", lambda *_: 1e11)
    return commands.make(capsys, monkeypatch)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commands.small_files(tmp_path_factory.mktemp("files"))


def config_of(run: Path) -> dict[str, object]:
    return json.loads((run / "run.json").read_text())["config"]


def test_a_run_is_repeated_from_its_record(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    words = commands.options(files, method="eap-ig", edges=20, seed=3, metric="logit_diff", ablation="mean")
    words += ["--method-option", "steps=2", "--task-option", "prepend_bos=false", "--absolute", "--no-split-qkv"]
    first = pahq("discover", *words, "--out", tmp_path / "a", "-q", "--no-view")
    assert first.code == codes.DONE, first.err
    again = pahq("discover", "--config", tmp_path / "a" / "run.json", "--out", tmp_path / "b", "-q", "--no-view")
    assert again.code == codes.DONE, again.err
    assert config_of(tmp_path / "b") == config_of(tmp_path / "a")
    assert (tmp_path / "b" / "circuit.safetensors").read_bytes() == (
        tmp_path / "a" / "circuit.safetensors"
    ).read_bytes()

    other = ["--seed", 4, "--method-option", "steps=3", "--split-qkv", "--signed"]
    words = ["--config", tmp_path / "a" / "run.json", "--out", tmp_path / "c", "-q", "--no-view", *other]
    assert pahq("discover", *words).code == codes.DONE
    changed = {"seed": 4, "method_options": {"steps": 3}, "split_qkv": True, "absolute": False}
    assert config_of(tmp_path / "c") == {**config_of(tmp_path / "a"), **changed}


def test_yaml_says_the_same_as_flags(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    facts = {
        "model": str(files / "model"),
        "task": str(files / "prompts.jsonl"),
        "threshold": "1e-3",  # which YAML takes for text
        "n": 4,
        "metric": "kl_div",
        "head-order": "ascending",
        "check": False,
        "policy": "bf16",
        "exact": False,
        "task_options": {"prepend_bos": False},
        "out": str(tmp_path / "run"),
        "view": False,
        "quiet": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(facts).replace("'1e-3'", "1e-3"))
    answer = pahq("discover", "--config", tmp_path / "run.yaml", "--exact")
    assert (answer.code, answer.out, answer.err) == (codes.DONE, "", "")
    found = config_of(tmp_path / "run")
    want = {
        "threshold": 0.001,
        "n": 4,
        "head_order": "ascending",
        "policy": "bf16",
        "exact": True,
        "task_options": {"prepend_bos": False},
    }
    assert {name: found[name] for name in want} == want
    assert not (tmp_path / "run" / "viewer.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.yaml", "treshold: 1", "option 'treshold' is unknown; did you mean 'threshold'?"),
        ("c.yaml", "config: x", "option 'config' is unknown"),
        ("c.yaml", "n: [1]", "n is [1]; give one number or text"),
        ("c.yaml", "n: true", "n is True; give one number or text"),
        ("c.yaml", "check: 1", "check is 1; give true or false"),
        ("c.yaml", "seed: 1\nn: 2\nseed: 3", "'seed' is there twice; remove one"),
        ("c.yaml", "model: m\ntask: ioi\nn: 2.5", "Invalid value for '--n'"),
        ("c.yaml", "a: [", "line 1: broken YAML"),
        ("c.yaml", "", "holds no options"),
        ("c.yaml", "- n", "holds no options"),
        ("c.yaml", "1: 2", "holds no options"),
        ("c.yaml", "task_options: [a]", "task_options is ['a']; give an object of names and values"),
        ("c.yaml", "x: !!python/object/apply:os.system ['true']", "broken YAML"),
        ("c.json", "{", "not valid JSON"),
        ("c.json", '{"config": {"model": "object:GPT"}}', "the model was a Python object (GPT); name one with --model"),
        ("c.yaml", "task: ioi", "Missing option '--model'"),
        ("c.yaml", "model: m\ntask: ioi\nthreshold: low", "Invalid value for '--threshold'"),
    ],
)
def test_faults_of_a_file_are_one_line(pahq: Pahq, tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    answer = pahq("discover", "--config", tmp_path / name)
    assert answer.code == codes.REFUSED
    assert message in answer.error


def test_a_missing_file_is_one_line(pahq: Pahq) -> None:
    assert "/absent/c.yaml: there is no such file" in pahq("discover", "--config", "/absent/c.yaml").error


def test_shells_complete_commands_and_options() -> None:
    def completed(line: str) -> str:
        words = line.split(" ")
        env = os.environ | {"_PAHQ_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        code = (
            "import sys\n"
            "sys.argv = ['pahq']\n"
            "from pahq.cli.app import main\n"
            "try: main()\n"
            "finally: assert not {'torch', 'transformers', 'yaml'} & set(sys.modules)"
        )
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout

    assert completed("pahq disc").split() == ["discover"]
    assert "--threshold" in completed("pahq discover --thr")
