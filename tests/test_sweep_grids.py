"""Grids of ``pahq sweep``: what runs they stand for, their names and commands, and errors that name the key."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from pahq.cli.app import app
from pahq.cli.options import method_options, task_options
from pahq.errors import PahqError
from pahq.report.config import RunConfig
from pahq.reproduction.paper import PAHQ_THRESHOLDS, acdc_thresholds
from pahq.reproduction.settings import GridOptions
from pahq.sweeps.command import EXTRAS, words
from pahq.sweeps.grid import changed, read_grid, shipped
from pahq.sweeps.runs import Run, expand, run_name

GRID: dict[str, Any] = {"tasks": "ioi", "models": "gpt2", "thresholds": 0.01, "metrics": "kl_div"}


def names(grid: dict[str, Any]) -> list[str]:
    return [run.name for run in expand(grid, "grid")]


def parsed(run: Run) -> dict[str, Any]:
    """The options that ``pahq discover`` reads from a run's command."""
    click: Any = typer.main.get_command(app)
    given = shlex.split(run.command(Path("out")))
    assert given[:2] == ["pahq", "discover"]
    command = click.commands["discover"]
    return command.make_context("discover", given[2:], resilient_parsing=False).params


def test_names_have_a_method_and_a_policy_only_where_it_is_not_the_usual_one() -> None:
    assert names(GRID) == ["ioi_gpt2_0.01_kl_div"]
    assert names(GRID | {"methods": ["acdc", "eap"], "policies": ["fp32", "pahq"]}) == [
        "ioi_gpt2_0.01_kl_div",
        "ioi_gpt2_0.01_kl_div_pahq",
        "ioi_gpt2_0.01_kl_div_eap",
        "ioi_gpt2_0.01_kl_div_eap_pahq",
    ]
    # So that a run is called the same, and found again, in a grid that has grown.
    assert names(GRID | {"methods": ["eap"], "edges": [100]}) == ["ioi_gpt2_100edges_kl_div_eap"]
    assert names(GRID | {"methods": "edge-pruning", "thresholds": []}) == ["ioi_gpt2_own_kl_div_edge-pruning"]
    assert names(GRID | {"models": "openai-community/gpt2", "name": "again"}) == ["ioi_gpt2_0.01_kl_div_again"]
    assert names(GRID | {"models": {"../x y": "gpt2"}, "thresholds": ["1e-6", 1]}) == [
        "ioi_.._x_y_1e-06_kl_div",
        "ioi_.._x_y_1_kl_div",
    ]
    assert "/" not in run_name(["../../etc", "a/b", ""])
    assert not run_name(["..", "."]).startswith(".")


def test_runs_come_in_the_order_of_the_grid_and_once() -> None:
    grid = {"tasks": ["ioi", "induction"], "models": ["gpt2", "m/x"], "thresholds": [0.1, 0.01], "metrics": "kl_div"}
    found = names(grid)
    assert found == [f"{t}_{m}_{x}_kl_div" for t in ("ioi", "induction") for m in ("gpt2", "x") for x in (0.1, 0.01)]
    two = {"grids": [grid, {**GRID, "thresholds": [0.01, 0.5]}]}
    assert names(two) == [*found, "ioi_gpt2_0.5_kl_div"]
    assert [run.name for run in expand(grid, "grid", only="*_x_0.1_*")] == [
        "ioi_x_0.1_kl_div",
        "induction_x_0.1_kl_div",
    ]


def test_parts_take_from_the_top_what_they_do_not_say() -> None:
    grid = {
        "models": "gpt2",
        "metrics": ["kl_div", "task"],
        "thresholds": {"from": 0.01, "to": 1, "points": 3},
        "options": {"n": 8, "seed": 3},
        "grids": [
            {"tasks": "ioi", "options": {"n": 4}},
            {"tasks": "greaterthan", "methods": "eap", "edges": 50, "metrics": "task"},
        ],
    }
    runs = expand(grid, "grid")
    facts = [
        (r.config.task, r.config.metric, r.config.threshold, r.config.edges, r.config.n, r.config.seed) for r in runs
    ]
    assert facts == [
        *[("ioi", metric, t, None, 4, 3) for metric in ("kl_div", "logit_diff") for t in (0.01, 0.1, 1)],
        ("greaterthan", "greaterthan", None, 50, 8, 3),
    ]
    flags = changed(grid, {"thresholds": ["0.5"], "models": ["m/y"]}, {"n": 2})
    assert {(r.model, r.config.threshold, r.config.n) for r in expand(flags, "grid")} == {("y", 0.5, 2), ("y", None, 2)}


def test_commands_say_what_the_run_is() -> None:
    options = {
        "absolute": True,
        "exact": False,
        "check": True,
        "split_qkv": False,
        "order_by_score": True,
        "prefilter": "eap-ig",
        "keep": 0.125,
        "method_options": {"steps": 3},
        "task_options": {"templates": 2, "prepend_bos": False},
        "view": False,
        "dtype": "float64",
        "ablation": "mean",
        "wandb": True,
        "wandb_tags": "a,b c",
    }
    grid = GRID | {
        "options": options | {"dtype": "float32"},
        "policies": ["attention=e4m3,mlp=int8"],
        "thresholds": [1e-7],
    }
    (run,) = expand(grid, "grid")
    found = parsed(run)
    assert method_options(found.pop("method_option")) == run.config.method_options
    assert task_options(found.pop("task_option")) == run.config.task_options
    for name, value in run.config.to_dict().items():
        if not name.endswith("_options"):
            assert found[name] == value, name
    assert (found["view"], found["wandb"], found["wandb_tags"], found["out"]) == (
        False,
        True,
        "a,b c",
        f"out/{run.name}",
    )
    (signed,) = expand(GRID | {"methods": "eap", "options": {"absolute": False}}, "grid")
    assert "--signed" in signed.words(Path("out"))
    plain = [
        "discover",
        "--model",
        "gpt2",
        "--task",
        "ioi",
        "--threshold",
        "0.01",
        "--metric",
        "kl_div",
        "--out",
        "-o/x",
    ]
    assert words(RunConfig("gpt2", "ioi", 0.01, metric="kl_div"), {}, "-o/x") == plain


def test_names_are_such_as_files_may_have() -> None:
    name = run_name(["ü" * 150, "ü" * 150])
    assert name == "ü" * 100  # 200 bytes; with an ending a file system takes 255


def test_every_option_of_discover_can_be_shared() -> None:
    click: Any = typer.main.get_command(app)
    options = {param.name for param in click.commands["discover"].params} - {"method_option", "task_option", "help"}
    nested = {"task_options", "method_options"}
    # The sweep sets the folder, and reads what runs say; a trace would be one file for all.
    own = {"out", "quiet", "as_json", "config_file", "trace"}
    assert options - own == (set(RunConfig.__dataclass_fields__) - nested) | set(EXTRAS)


def test_the_papers_grid_is_that_of_its_reproduction() -> None:
    grid, where = read_grid("paper")
    runs = expand(grid, where)
    assert len(runs) == 3 * 2 * (3 * 4 + 4)
    settings = {setting.name: setting for setting in GridOptions().settings()}
    for run in runs:
        setting, config = settings[run.config.task], run.config
        assert config.model == setting.model.removeprefix("object:")
        assert config.metric in setting.metrics.values()
        for name, value in setting.common.items():
            assert getattr(config, name) == value, (run.name, name)
        if config.method == "acdc":
            assert config.threshold in PAHQ_THRESHOLDS
        else:
            assert setting.known is not None
            assert config.edges == setting.known.n_edges
    assert "ioi_gpt2_0.001_kl_div_pahq-values" in {run.name for run in runs}


def test_acdcs_grid_has_its_thresholds() -> None:
    grid, where = read_grid("acdc")
    runs = expand(grid, where)
    kinds = {"kl_div": "kl"}
    for task in ("docstring", "greaterthan", "ioi"):
        for metric in {run.config.metric for run in runs if run.config.task == task}:
            found = [r.config.threshold for r in runs if (r.config.task, r.config.metric) == (task, metric)]
            assert np.allclose(np.array(found, float), acdc_thresholds(task, kinds.get(str(metric), "task")), rtol=1e-5)


def test_all_shipped_grids_can_be_run() -> None:
    assert set(shipped()) == {"acdc", "demo", "paper"}
    for name in shipped():
        assert expand(*read_grid(name))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: ioi", "'task' is unknown; did you mean 'tasks'?"),
        ("tasks: ioi", "models: is missing"),
        ("models: gpt2", "tasks: is missing"),
        ("thresholds: [0.1, low]", "thresholds: 'low' is no finite number"),
        ("thresholds: -1", "thresholds: -1 is no finite number"),
        ("thresholds: true", "thresholds: True is no finite number"),
        ("thresholds: .inf", "thresholds: inf is no finite number"),
        ("thresholds: [0.1, 0.10]", "thresholds: 0.1 is there twice"),
        ("thresholds: []", "thresholds: method acdc needs some; give thresholds"),
        ("thresholds: {from: 1, to: 0.1, points: 3}", "thresholds: from 1 to 0.1: give two numbers above 0"),
        ("thresholds: {from: 0.1, to: 1}", "thresholds: {'from': 0.1, 'to': 1} is no range"),
        ("thresholds: {from: 0.1, to: 1, points: 1.5}", "thresholds: points: 1.5 is no number of points"),
        ("edges: 2.5", "edges: 2.5 is no number of edges"),
        ("methods: [acdc, magic]", "methods: 'magic' is unknown; known: acdc"),
        ("methods: []", "methods: the list is empty"),
        ("methods: {a: acdc}", "methods: {'a': 'acdc'} are names; give plain values"),
        ("metrics: loss", "metrics: metric 'loss'"),
        ('tasks: "a\\tb.csv"', "tasks: 'a\\tb.csv' holds what cannot be printed"),
        ("policies: pahqq", "policies: policy 'pahqq' is unknown"),
        ("policies: [no]", "policies: False is no name"),
        ("tasks: poetry", "tasks: task 'poetry' is unknown"),
        ("tasks: absent.jsonl", "tasks: task file"),
        ("models: [a/m, b/m]", "models: 'a/m' and 'b/m' are both called 'm'; name them"),
        ("models: {1: a/m}", "models: {1: 'a/m'}: names must be text"),
        ("options: 3", "options: 3 are no names and values"),
        ("options: {steps: 3}", "options: 'steps' is unknown"),
        ("options: {nn: 3}", "options: 'nn' is unknown; did you mean 'n'?"),
        ("options: {n: many}", "options: n is 'many'; give a whole number"),
        ("options: {n: true}", "options: n is True; give a whole number"),
        ("options: {n: 0}", "options: n: 0 prompts are too few"),
        ("options: {check: 1}", "options: check is 1; give true or false"),
        ("options: {threshold: 0.1}", "options: 'threshold' is no option of all runs; list values under 'thresholds'"),
        ("options: {out: x}", "options: 'out' is unknown"),
        ("options: {device: abacus}", "options: device: 'abacus' cannot be used"),
        ("options: {task_options: {templates: '2'}}", "options: task_options: templates is '2', which would be read"),
        ("options: {task_options: {seed: [1]}}", "options: task_options: seed is [1]; give one number"),
        ("options: {task_options: {verses: 2}}", "tasks: task 'ioi': option 'verses' is unknown"),
        ("options: {method_options: {steps: 2}}", "options: method_options:"),
        ("options: {wandb: true, wandb_mode: of}", "options: wandb mode: 'of' is unknown; known: online, offline"),
        ("options: {wandb_group: g}", "options: wandb-group: 'g' goes with --wandb"),
        ("grids: {tasks: ioi}", "grids: {'tasks': 'ioi'} is no list of grids"),
        ("grids: [{task: ioi}]", "grids, part 1: 'task' is unknown; did you mean 'tasks'?"),
        ("grids: [{}, {options: {n: 3}}]", "grids, part 2: run ioi_gpt2_0.1_kl_div is there already (n is 16 there, 3"),
        ("grids: [{name: 3}]", "grids, part 1: name: 3 is no text"),
        ("tasks: [ioi\n", "broken YAML"),
        ("options: {n: 1, n: 2}", "'n' is there twice"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    given = {"tasks": "ioi", "models": "gpt2", "thresholds": 0.1, "metrics": "kl_div"}
    missing = {"tasks: ioi", "models: gpt2"}  # those two are all there is
    lines = [f"{key}: {value}" for key, value in given.items() if key not in text and text not in missing]
    file = tmp_path / "grid.yaml"
    file.write_text("\n".join([*lines, text]))
    with pytest.raises(PahqError) as error:
        expand(*read_grid(file))
    assert str(error.value).startswith(f"{file}: "), error.value
    assert message in str(error.value)


def test_grids_that_cannot_be_read(tmp_path: Path) -> None:
    for name, content, message in (
        ("list.yaml", b"- tasks\n", "holds no grid"),
        ("odd.yaml", b"tasks: \xff\n", "not UTF-8"),
        ("none.yaml", None, "there is no such file"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(PahqError, match=message):
            read_grid(tmp_path / name)
    with pytest.raises(PahqError, match=r"grid 'papre': is neither a .yaml file nor shipped; shipped are acdc, demo"):
        read_grid("papre")
