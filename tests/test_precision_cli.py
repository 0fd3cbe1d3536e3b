"""``pahq policies`` and ``pahq precision`` as a user meets them."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

import commands
from commands import Pahq
from pahq.evaluation.precision import groups, snr
from pahq.precision.formats import FORMATS
from pahq.precision.policy import KINDS, POLICIES
from pahq.report.progress import LiveWatch, PlainWatch, Watch
from pahq.report.steps import Steps
from pahq.report.study import StudyFolder
from pahq.report.tables import as_csv, as_json
from tiny import save_model, save_prompts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_model(folder / "model", layers=3, heads=2)
    save_prompts(folder / "prompts.jsonl")
    return folder


def common(files: Path, **more: object) -> list[object]:
    given = {"model": files / "model", "task": files / "prompts.jsonl", "n": 3, "metric": "kl_div", **more}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]


STUDIES: dict[str, list[object]] = {
    "snr": [],
    "sensitivity": ["--threshold", 0.001, "--formats", "fp32,bf16", "--kinds", "o,mlp,norm", "--budget", "0.9x"],
    "groups": ["--threshold", 0.001, "--heads", 2, "--tests", 8],
}
COLUMNS = {
    "snr": {"variant", "point", "layer", "signal", "noise", "snr_db", "snr_db_read"},
    "sensitivity": {"kind", "format", "quantised", "decisions", "spearman", "bytes", "seconds"},
    "groups": {"quantised", "group", "passes", "bytes_high", "seconds", "decisions", "spearman"},
}


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_from_start_to_finish(pahq: Pahq, files: Path, tmp_path: Path, study: str) -> None:
    out = tmp_path / "out"
    answer = pahq("precision", study, *common(files), *STUDIES[study], "--out", out)
    assert answer.code == 0, answer.err
    assert answer.err.startswith("loading ")
    assert answer.out.splitlines()[-1] == f"written: {out}"
    assert sorted(entry.name for entry in out.iterdir()) == sorted(["run.json", f"{study}.csv", f"{study}.png"])
    assert (out / f"{study}.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((out / "run.json").read_text())
    assert record["command"].startswith(f"pahq precision {study} --model {files / 'model'}")
    assert record["study"] == study
    assert record["config"] | {"n": 3, "seed": 0, "metric": "kl_div"} == record["config"]
    for key in ("versions", "commit", "machine", "identity", "started", "finished", "peak_memory", "total_seconds"):
        assert key in record, key

    rows = list(csv.DictReader(io.StringIO((out / f"{study}.csv").read_text())))
    assert len(rows) == len(record["figures"]["rows"]) > 3
    assert COLUMNS[study] <= set(rows[0])
    for row, same in zip(rows, record["figures"]["rows"], strict=True):
        assert set(row) == set(same)
        for key, value in same.items():
            shown = row[key]
            if isinstance(value, float):
                assert float(shown) == value  # in full: it reads back exactly
            elif value is not None:
                assert shown == str(value)

    again = pahq("precision", study, *common(files, seed=1), *STUDIES[study], "--out", out, "--quiet", "--json")
    assert (again.code, again.err) == (0, "")
    assert json.loads(again.out)["config"]["seed"] == 1  # a study of the same kind is replaced
    assert json.loads((out / "run.json").read_text())["config"]["seed"] == 1


def test_sensitivity_says_what_it_is_asked(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = pahq("precision", "sensitivity", *common(files), *STUDIES["sensitivity"], "--out", out)
    rows = json.loads((out / "run.json").read_text())["figures"]["rows"]
    for row in rows:
        if row["format"] == "fp32":
            assert (row["decisions"], row["error_rms"]) == (1.0, 0.0)
    assert [(row["kind"], row["quantised"]) for row in rows if row["format"] == "bf16"] == [
        ("o", "differences"),
        ("mlp", "differences"),
        ("norm", "values"),
    ]
    assert "recommended" in answer.out
    assert "100.00 %" in answer.out


def test_sensitivity_of_a_finished_run(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    """The same figures as with a sweep of its own; refused on other prompts."""
    run, out, other = tmp_path / "run", tmp_path / "out", tmp_path / "other"
    assert pahq("discover", *common(files), "--threshold", 0.001, "--out", run, "-q").code == 0
    words = STUDIES["sensitivity"][2:]
    answer = pahq("precision", "sensitivity", *common(files, metric="nll"), *words, "--run", run, "--out", out)
    assert answer.code == 0, answer.err
    assert pahq("precision", "sensitivity", *common(files), *STUDIES["sensitivity"], "--out", other, "-q").code == 0
    first, second = (json.loads((folder / "run.json").read_text()) for folder in (out, other))
    assert first["config"]["metric"] == "kl_div"  # the run's
    assert first["config"]["threshold"] == 0.001
    assert first["figures"]["sweep_tests"] == second["figures"]["sweep_tests"]
    wide = tmp_path / "wide"
    assert pahq("discover", *common(files), "--threshold", 1, "--dtype", "float64", "--out", wide, "-q").code == 0
    timed = ("seconds", "time_ratio")
    for one, two in zip(first["figures"]["rows"], second["figures"]["rows"], strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in two.items() if k not in timed}
    for more, folder, message in (
        ({"seed": 5}, run, f"{run}: its prompts are others"),
        ({}, out, f"{out}: not the folder of a run of pahq discover"),
        ({}, wide, f"{wide}: the run is in float64"),
        ({}, tmp_path / "absent", "there is no finished run"),
    ):
        refused = pahq("precision", "sensitivity", *common(files, **more), "--run", folder, "--out", tmp_path / "no")
        assert message in refused.error
        assert not (tmp_path / "no").exists()


def test_fp32_has_no_noise(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--policy", "fp32", "--edge", "a0.0->a1.1.q", "--out", out]
    answer = pahq("precision", "snr", *common(files), *options)
    assert answer.code == 0, answer.err
    assert "∞" in answer.out
    assert "a0.0->a1.1.q" in answer.out
    rows = list(csv.DictReader(io.StringIO((out / "snr.csv").read_text())))
    assert {row["snr_db"] for row in rows} == {"inf"}
    assert {row["noise"] for row in rows} == {"0.0"}
    assert all(row["snr_db"] is None for row in json.loads((out / "run.json").read_text())["figures"]["rows"])


def test_the_folder_has_a_name_by_default(
    pahq: Pahq, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = pahq("precision", "snr", *common(files), "--policy", "mlp=bf16")
    assert answer.out.splitlines()[-1] == "written: runs/precision-snr-model-prompts-mlp_bf16"
    assert (tmp_path / "runs" / "precision-snr-model-prompts-mlp_bf16" / "snr.csv").exists()


def test_without_matplotlib_there_is_a_note(
    pahq: Pahq, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    answer = pahq("precision", "groups", *common(files), *STUDIES["groups"], "--out", tmp_path / "out")
    assert answer.code == 0
    assert answer.err.splitlines()[-1] == "no plot: matplotlib is not installed (pip install 'pahq[plot]')"
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["groups.csv", "run.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["snr", "--policy", "fp3"], "policy 'fp3' is unknown"),
        (["snr", "--edge", "a0.0->a9.0.q"], "edge 'a0.0->a9.0.q' does not exist"),
        (["snr", "--edge", "direct->a1.0.q"], "edge 'direct->a1.0.q' is a direct one"),
        (["snr", "--under-test", "all"], "under_test: 'all' is unknown"),
        (["snr", "--metric", "speed"], "metric 'speed' is unknown"),
        (["snr", "--n", 0], "n: 0 prompts are too few"),
        (["snr", "--ablation", "none"], "ablation: 'none' is unknown"),
        (["snr", "--device", "abacus"], "device: 'abacus' cannot be used"),
        (["snr", "--task", "nothing"], "task 'nothing'"),
        (["snr", "--policy", "mlp=tf32"], "policy 'mlp=tf32': format 'tf32'"),
        (["sensitivity", "--formats", "bf16,fp4"], "format 'fp4' is unknown"),
        (["sensitivity", "--kinds", "q,heads"], "component 'heads' is unknown"),
        (["sensitivity", "--budget", "some"], "budget 'some' is no size"),
        (["sensitivity", "--budget", "0.001x"], "budget:"),
        (["sensitivity", "--quantised", "nothing"], "quantised 'nothing' is unknown"),
        (["sensitivity", "--threshold", -1], "threshold: -1.0"),
        (["groups", "--policy", "fp32"], "policy 'fp32': everything is FP32"),
        (["groups", "--heads", 50, "--tests", 99], "heads: 50 of"),
        (["groups", "--sizes", "1,two"], "sizes '1,two' are not whole numbers"),
        (["groups", "--sizes", "-4,1"], "sizes: -4 is no size"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    pahq: Pahq, files: Path, tmp_path: Path, words: list[Any], message: str
) -> None:
    study, *rest = words
    given = dict(zip(rest[::2], rest[1::2], strict=True))
    usual = [word for pair in zip(*[iter(common(files))] * 2, strict=True) if pair[0] not in given for word in pair]
    answer = pahq("precision", study, *usual, *rest, "--out", tmp_path / "out")
    assert answer.error.startswith(message) or message in answer.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sensitivity", "--formats", "bf16,fp4"], "format 'fp4' is unknown"),
        (["sensitivity", "--budget", "some"], "budget 'some' is no size"),
        (["groups", "--sizes", "-4,1"], "sizes: -4 is no size"),
    ],
)
def test_options_are_judged_before_the_model_is_loaded(
    pahq: Pahq, tmp_path: Path, words: list[str], message: str
) -> None:
    study, *rest = words
    nowhere = tmp_path / "no-such-model"
    answer = pahq("precision", study, "--model", nowhere, "--task", "ioi", *rest, "--out", tmp_path / "out")
    assert message in answer.error


def test_foreign_folders_are_left_alone(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    answer = pahq("precision", "snr", *common(files), "--out", out)
    assert f"{out}: holds something else than a study of snr ('notes.txt')" in answer.error
    assert [entry.name for entry in out.iterdir()] == ["notes.txt"]
    other = tmp_path / "groups"
    assert pahq("precision", "groups", *common(files), *STUDIES["groups"], "--out", other, "-q").code == 0
    before = {entry.name: entry.read_bytes() for entry in other.iterdir()}
    assert "holds something else" in pahq("precision", "snr", *common(files), "--out", other).error
    assert {entry.name: entry.read_bytes() for entry in other.iterdir()} == before
    (tmp_path / "file").write_text("")
    assert (
        "a file lies where a folder is needed"
        in pahq("precision", "snr", *common(files), "--out", tmp_path / "file").error
    )


@pytest.mark.parametrize("study", ["snr", "groups"])
def test_interrupted_studies_leave_nothing(
    pahq: Pahq, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(snr, "_figures", interrupt)
    monkeypatch.setattr(groups, "edge_effects", interrupt)
    answer = pahq("precision", study, *common(files), *STUDIES[study], "--out", tmp_path / "out")
    assert (answer.code, answer.out) == (130, "")
    assert answer.err.splitlines()[-1] == "interrupted; nothing was written"
    assert not (tmp_path / "out").exists()


def test_an_interrupted_repeat_keeps_the_former_files(
    pahq: Pahq, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert pahq("precision", "snr", *common(files), "--out", out, "-q").code == 0
    before = {entry.name: entry.read_bytes() for entry in out.iterdir()}

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(snr, "_figures", interrupt)
    assert pahq("precision", "snr", *common(files, seed=3), "--out", out).code == 130
    assert {entry.name: entry.read_bytes() for entry in out.iterdir()} == before


def test_policies_as_a_table(pahq: Pahq) -> None:
    answer = pahq("policies")
    assert (answer.code, answer.err) == (0, "")
    for name in (*POLICIES, *FORMATS):
        assert any(line.split()[:1] == [name] for line in answer.out.splitlines()), name
    line = next(line for line in answer.out.splitlines() if line.startswith("pahq-values "))
    assert line.split() == ["pahq-values", "e4m3", "bf16", "bf16", "bf16", "bf16", "fp32", "values", "both"]
    table = answer.out.partition("\nrest:")[0]
    assert all(len(line) <= 80 for line in table.splitlines())  # so that no cell is broken on a terminal


def test_policies_as_json(pahq: Pahq) -> None:
    facts = json.loads(pahq("policies", "--json").out)
    assert [policy["name"] for policy in facts["policies"]] == list(POLICIES)
    for policy in facts["policies"]:
        assert set(policy["formats"]) == set(KINDS)
        assert policy["about"]
    assert [fmt["name"] for fmt in facts["formats"]] == list(FORMATS)


@pytest.mark.parametrize("words", [["precision", "--help"], ["precision", "snr", "--help"], ["policies", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert commands.help_without(["torch", "transformers", "numpy", "matplotlib"], words)


def test_csv_and_json_of_odd_numbers() -> None:
    rows = [{"a": math.inf, "b": None, "c": 0.1 + 0.2}, {"a": -math.inf, "b": "x,y", "c": math.nan}]
    assert as_csv(rows).decode() == 'a,b,c\ninf,,0.30000000000000004\n-inf,"x,y",nan\n'
    assert as_csv([]) == b"\n"
    assert as_json({"rows": (rows[0],)}) == {"rows": [{"a": None, "b": None, "c": 0.1 + 0.2}]}


def test_steps_are_shown_where_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("pahq.report.steps.PLAIN_INTERVAL", 0.0)
    plain, live = io.StringIO(), Terminal()
    for watch in (Watch(), PlainWatch(plain), LiveWatch(live)):
        steps = Steps(watch)
        steps.step("beginning …")
        for done in (1, 2):
            steps.step("working", done, 2)
        steps.end()
        steps.end()
    assert plain.getvalue().splitlines() == [
        "beginning …",
        "1 of 2: working, about 0:00 left",
        "2 of 2: working, about 0:00 left",
    ]
    assert "beginning …" in live.getvalue()


def test_a_study_that_fails_to_write_says_where(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "new", "snr")
    assert (tmp_path / "new").is_dir()
    folder.discard()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    StudyFolder(tmp_path / "old", "snr").discard()
    assert (tmp_path / "old").is_dir()  # it was there before
