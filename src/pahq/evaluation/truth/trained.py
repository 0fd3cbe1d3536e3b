"""Small transformers trained to implement known programs, with their weights and circuits beside this file.

Each was trained by interchange interventions on single edges and made strict: whatever the edges outside the circuit
carry, the answer stays (Geiger et al. 2022; strictness: Gupta et al. 2024, InterpBench). ``training/siit.py`` of the
repository makes a folder ``trained/<name>``: ``model.safetensors``, ``truth.json`` and ``losses.csv``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pahq.errors import PahqError
from pahq.files import read_json

if TYPE_CHECKING:
    from pahq.evaluation.truth.base import Truth
    from pahq.evaluation.truth.program import Program
    from pahq.model import Transformer
    from pahq.task import Task

HERE = Path(__file__).with_name("trained")
PREFIX = "trained-"
PROGRAMS = {
    "sum": ("algorithms", "Sum"),
    "majority": ("algorithms", "Majority"),
    "induction": ("algorithms", "Induction"),
    "induction-offset": ("algorithms", "InductionOffset"),
    "maximum": ("algorithms", "Maximum"),
    "ioi": ("indirect_object", "IndirectObject"),
}
"""Module and class of every program that a model is trained to be."""


def get_program(name: str) -> Program:
    """The program ``name``; raises PahqError for an unknown one."""
    if name not in PROGRAMS:
        raise PahqError(f"program '{name}' is unknown; choose one of {', '.join(PROGRAMS)}")
    module, cls = PROGRAMS[name]
    return getattr(import_module(f"pahq.evaluation.truth.{module}"), cls)()


def names() -> dict[str, str]:
    """Every trained model with one line about its circuit."""
    found = {name: HERE / name / "truth.json" for name in PROGRAMS}
    return {PREFIX + name: str(read_json(path).get("about")) for name, path in found.items() if path.is_file()}


def load(name: str) -> Truth:
    """The circuit of a trained model, with the model and its prompts. Raises PahqError for damaged files."""
    from pahq.evaluation.truth.base import read_truth

    case = name.removeprefix(PREFIX)
    truth = read_truth(HERE / case / "truth.json")
    return replace(truth, get_model=partial(load_model, case), get_task=partial(load_task, case))


def load_model(case: str, folder: Path | None = None) -> Transformer:
    """The trained model of a case, float32. folder: where its files are if not beside this module."""
    from pahq.evaluation.truth.base import read_truth
    from pahq.model import build
    from pahq.model.checkpoint import read_tensors

    folder = HERE / case if folder is None else folder
    config = read_truth(folder / "truth.json").graph.config
    weights = {name: weight.float() for name, weight in read_tensors(folder).items()}
    return build(config, weights, source={"kind": "trained", "case": case})


def load_task(case: str) -> Task:
    """The prompts of a case: pairs of random prompts of its program that have different answers."""
    from pahq.evaluation.truth.drawn import DrawnTask

    return DrawnTask(get_program(case))
