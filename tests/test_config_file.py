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
from pahq.method.registry import METHODS as METHOD_NAMES


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


METHODS: list[dict[str, object]] = [
    {"method": "acdc", "threshold": 0.01, "policy": "pahq", "under_test": "sender", "sender_order": "earliest"},
    {"method": "acdc", "threshold": 0.01, "prefilter": "hisp", "keep": 0.5},
    {"method": "eap", "threshold": 0.01, "metric": "logit_diff"},
    {"method": "exact", "edges": 30, "select": "greedy"},
    {"method": "hisp", "edges": 30},
    {"method": "subnetwork-probing", "metric": "logit_diff", "method_option": "steps=3"},
    {"method": "edge-pruning", "metric": "logit_diff", "method_option": "steps=3"},
    {"method": "information-flow", "edges": 30},
    {"method": "random", "edges": 30, "seed": 2},
]
"""With ``eap-ig`` above, every method there is."""


@pytest.mark.parametrize("given", METHODS, ids=lambda given: str(given.get("prefilter", given["method"])))
def test_every_method_is_repeated_from_its_record(
    pahq: Pahq, files: Path, tmp_path: Path, given: dict[str, object]
) -> None:
    rest = ["-q", "--no-view", "--out"]
    first = pahq("discover", *commands.options(files, **given), *rest, tmp_path / "a")
    assert first.code == codes.DONE, first.err
    again = pahq("discover", "--config", tmp_path / "a" / "run.json", *rest, tmp_path / "b")
    assert again.code == codes.DONE, again.err
    assert config_of(tmp_path / "b") == config_of(tmp_path / "a")
    for name in ("circuit.safetensors", "circuit.json"):
        one, other = ((tmp_path / run / name).read_bytes() for run in "ab")
        assert one == other, name


def test_these_are_all_methods() -> None:
    assert {str(given["method"]) for given in METHODS} | {"eap-ig"} == set(METHOD_NAMES)


def test_evaluations_are_repeated_from_their_records(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        words = commands.options(files, method="random", edges=30, seed=seed)
        assert pahq("discover", *words, "-q", "--no-view", "--out", tmp_path / name).code == codes.DONE
    few = ["--n", 5, "--bootstrap", 20, "--seed", 4, "--metric", "kl_div"]
    more = ["--knockouts", 0, "--removals", 1, "--random-circuits", 1, "--unit", "edge", "--against", tmp_path / "b"]
    for command, kind, options in (("evaluate", "evaluation", [*few, *more]), ("compare", "comparison", few)):
        runs, out = (tmp_path / "a", tmp_path / "b"), tmp_path / kind
        first = pahq(command, *runs, *options, "-q", "--json", "--out", out)
        assert first.code == codes.DONE, first.err
        record, told = out / f"{kind}.json", json.loads(first.out)
        again = pahq(command, "--config", record, "-q", "--json")
        assert again.code == codes.DONE, again.err
        same = json.loads(again.out)
        for name in ("options", "runs", "roc", "agreement", "notes"):
            assert same[name] == told[name], name

        facts = {"runs": [str(run) for run in runs], "n": 4, "bootstrap": 0, "metric": "kl_div"}
        facts |= {"knockouts": 0, "removals": 0, "random-circuits": 0} if command == "evaluate" else {}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(facts))
        own = pahq(command, "--config", tmp_path / "own.yaml", "--n", 3, "-q", "--json")
        assert own.code == codes.DONE, own.err
        assert [(row["run"], row["prompts"]) for row in json.loads(own.out)["runs"]] == [(str(r), 3) for r in runs] or (
            command == "compare"
        )
        other = {"evaluate": "compare", "compare": "evaluate"}[command]
        refused = pahq(other, "--config", record)
        assert refused.error == f"{record}: the record of pahq {command}; give it to that command"
        assert f"the record of pahq {command}" in pahq("discover", "--config", record).error
    (tmp_path / "own.yaml").write_text("runs: a")
    assert "runs is 'a'; give a list" in pahq("compare", "--config", tmp_path / "own.yaml").error


def test_json_may_stand_in_a_file(pahq: Pahq, tmp_path: Path) -> None:
    """Then an error is told as JSON, too."""
    (tmp_path / "c.yaml").write_text("json: true\nmodel: m\ntask: ioi\nthreshold: -1\n")
    answer = pahq("discover", "--config", tmp_path / "c.yaml")
    assert answer.error in json.loads(answer.out)["error"]["message"]


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
