"""The viewer of finished runs: what ``pahq view``, ``pahq.view`` and every finished run call."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.inputs import load, task_of, task_options
from pahq.model import Transformer
from pahq.precision.policy import get_policy
from pahq.report import identity
from pahq.report.config import OBJECT
from pahq.report.finished import CircuitFolder, FinishedRun, circuit_in
from pahq.report.progress import Watch
from pahq.report.references import overlay_of
from pahq.report.viewer.drawing import Overlay, kept_nodes
from pahq.report.viewer.evidence import evidence
from pahq.report.viewer.facts import page_data
from pahq.report.viewer.page import read_page, write_page
from pahq.task import Task
from pahq.task.prompts import Prompts

VIEWER_FILE = "viewer.html"


def view(
    run: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    against: str | PathLike[str] | None = None,
    truth: str | None = None,
    model: Any = None,
    task: str | Task | None = None,
    with_model: bool = True,
    watch: Watch | None = None,
) -> Path:
    """Writes the viewer of a finished run, or of a folder with a circuit alone, one HTML file -> its path.

    out: the file; by default ``viewer.html`` in the run's folder, with a second circuit ``viewer-against-NAME.html``.
    against: folder of another run or circuit; truth: name or file of a known circuit; either is laid over the run's
    circuit. model, task: in place of the run's own. with_model: whether to load the model for attention patterns and
    words where the run's own page does not hold them already. Raises PahqError for bad input.
    """
    watch = Watch() if watch is None else watch
    found = circuit_in(run)
    overlay = overlay_of(found, truth, against)
    path = _file(found, out, overlay, (against, truth))
    if not isinstance(found, FinishedRun):
        missing = "the folder holds a circuit but no run, so there are no prompts to show them for"
        if with_model:
            watch.say(f"note: no attention patterns and words: {missing}")
        write_page(path, page_data(found.circuit, {"config": _options_of(found.circuit)}, None, overlay, missing))
        return path
    shown, missing = _kept_evidence(found), ""
    if shown is None and not with_model:
        missing = "the page was written without the model"
    elif shown is None and any(
        given is None and name.startswith(OBJECT)
        for given, name in ((model, found.config.model), (task, found.config.task))
    ):
        missing = "the run was started from Python on objects, which cannot be loaded by name"
        watch.say(f"note: no attention patterns and words: {missing}; call pahq.view with model and task")
    elif shown is None:
        shown = _fresh_evidence(found, model, task, watch)
    write_page(path, page_data(found.circuit, found.record, shown, overlay, missing))
    return path


def write_viewer(
    folder: Path, circuit: Circuit, record: dict[str, Any], model: Transformer, prompts: Prompts, watch: Watch
) -> None:
    """The page of a run that has just finished. Whatever goes wrong is a note: the run itself is whole by then."""
    try:
        shown = evidence(model, prompts, circuit.graph, kept_nodes(circuit))
        write_page(folder / VIEWER_FILE, page_data(circuit, record, shown))
    except Exception as error:
        reason = " ".join(str(error).split())
        watch.say(f"note: {VIEWER_FILE} was not written ({type(error).__name__}: {reason}); try: pahq view {folder}")


def _file(run: CircuitFolder, out: Any, overlay: Overlay | None, names: tuple[Any, Any]) -> Path:
    """Where the page goes. Raises PahqError for a path that cannot be a file, before any work is done."""
    if out is None:
        if overlay is None:
            return run.path / VIEWER_FILE
        name = Path(str(names[0] if names[0] is not None else names[1])).resolve().name.removesuffix(".json")
        return run.path / f"viewer-against-{name.replace(':', '-')}.html"
    path = Path(out)
    if path.is_dir():
        raise PahqError(f"{out}: a folder lies there; give the name of a file, such as {path / VIEWER_FILE}")
    if not path.parent.is_dir():
        raise PahqError(f"{out}: there is no folder {path.parent}; make it first, or choose another file")
    return path


def _options_of(circuit: Circuit) -> dict[str, Any]:
    """What a circuit without a run tells of the options that it was found with."""
    config = circuit.metadata.get("config")
    if isinstance(config, dict):
        return config
    by_size = bool((circuit.effects[circuit.mask] < 0).any())
    return {"model": circuit.graph.config.name, "absolute": by_size}


def _kept_evidence(run: FinishedRun) -> dict[str, Any] | None:
    """Patterns and words from the run's own page, if it was written of these very weights, prompts and edges."""
    data = read_page(run.path / VIEWER_FILE)
    if data is None or data.get("identity") != run.record.get("identity", {}):
        return None
    same = data.get("nodes_kept") == sorted(kept_nodes(run.circuit))
    shown = data.get("evidence")
    return shown if same and isinstance(shown, dict) else None


def _fresh_evidence(run: FinishedRun, model: Any, task: str | Task | None, watch: Watch) -> dict[str, Any]:
    config = run.config
    name = config.task if task is None else task
    of = name if isinstance(name, Task) else task_of(name, task_options(config))
    transformer = load(config.model if model is None else model, config, watch, get_policy("fp32"), None)
    prompts = of.prompts(transformer, config.n, config.seed, "validation")
    then = run.record.get("identity", {})
    now = {"weights": identity.of_model(transformer), "prompts": identity.of_prompts(prompts)}
    for what, words in (("weights", f"weights of {config.model}"), ("prompts", f"prompts of {config.task}")):
        if what in then and then[what] != now[what]:
            raise PahqError(
                f"{run.path}: the {words} are no longer those of the run; bring the old ones back, or leave out "
                "attention patterns and words with --no-model"
            )
    return evidence(transformer, prompts, run.circuit.graph, kept_nodes(run.circuit))
