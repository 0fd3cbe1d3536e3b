"""A grid of runs: read from YAML or flags, judged key by key, and spread out into runs in an order that stays.

A grid lists values: tasks × models × metrics × methods × policies × sizes (thresholds, edges). ``grids`` holds several
parts, each of which takes from the top what it does not say itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pahq.errors import PahqError
from pahq.files import naming, parse_yaml
from pahq.method.registry import METHODS, get_method
from pahq.sweeps.command import AXES

NAMED = ("tasks", "models", "policies")
"""Lists whose values may have names of the user's choice: ``models: {small: /path/a, large: /path/b}``."""
NUMBERS = ("thresholds", "edges")
OWN = "task"
"""In a list of metrics: the task's own."""
PART_KEYS = (*AXES.values(), "name", "options")
TOP_KEYS = (*PART_KEYS, "about", "grids")
_REQUIRED = ("tasks", "models")
_DEFAULTS: dict[str, Any] = {"metrics": [OWN], "methods": ["acdc"], "policies": {"fp32": "fp32"}}
_FILES = (".gguf", ".jsonl", ".json", ".csv")


def shipped() -> dict[str, str]:
    """Grids that come with pahq: name -> what they are about."""
    found = {}
    for file in sorted(files("pahq.sweeps").joinpath("grids").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            content = parse_yaml(file.read_text("utf-8"), file.name)
            found[file.name.removesuffix(".yaml")] = " ".join(content["about"].split())
    return found


def read_grid(grid: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(the grid as written, how errors name it): a file, one of ``shipped``, or a mapping as it is.

    Raises PahqError where there is none, or it is broken.
    """
    if isinstance(grid, Mapping):
        return dict(grid), "grid"
    path = Path(grid)
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        with naming(path):
            data = path.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise PahqError(f"{path}: not UTF-8 text ({error}); save it as such") from None
        content = parse_yaml(text, path)  # JSON is YAML, too
    elif str(grid) in shipped():
        name = f"{grid}.yaml"
        content, path = parse_yaml(files("pahq.sweeps").joinpath("grids", name).read_text("utf-8"), name), Path(name)
    else:
        raise PahqError(f"grid '{grid}': is neither a .yaml file nor shipped; shipped are {', '.join(shipped())}")
    if not isinstance(content, dict):
        raise PahqError(f"{path}: holds no grid; write for example 'tasks: [ioi]', 'models: gpt2', 'thresholds: 0.01'")
    return content, str(path)


def changed(grid: Mapping[str, Any], axes: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The grid with these lists and options in the place of its own, in all of its parts."""

    def change(part: Any, top: bool) -> Any:
        if not isinstance(part, Mapping):
            return part  # judged later
        own = part.get("options") or {}
        merged = {**own, **options} if isinstance(own, Mapping) else own
        return {**part, **(axes if top or set(axes) & set(part) else {}), **({"options": merged} if merged else {})}

    inner = grid.get("grids")
    found = change(grid, True)
    if isinstance(inner, list):
        found["grids"] = [change(part, False) for part in inner]
    return found


def parts(grid: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The grid's parts: axis -> name -> value, ``options`` -> mapping, ``name`` -> text, ``where`` for errors.

    Raises PahqError that names the key for one that is unknown or missing, and for values that cannot be.
    """
    _check_keys(grid, TOP_KEYS, where)
    shared = {key: value for key, value in grid.items() if key not in ("about", "grids")}
    inner = grid.get("grids")
    if inner is None:
        return [_part(shared, where)]
    if not isinstance(inner, list) or not inner or not all(isinstance(part, Mapping) for part in inner):
        raise PahqError(f"{where}: grids: {inner!r} is no list of grids; begin each with '- tasks: …' on a line")
    found = []
    for place, part in enumerate(inner, 1):
        here = f"{where}: grids, part {place}"
        _check_keys(part, PART_KEYS, here)
        options = [given.get("options") or {} for given in (shared, part)]
        merged = {**options[0], **options[1]} if all(isinstance(given, Mapping) for given in options) else options[-1]
        found.append(_part({**shared, **part, "options": merged}, here))
    return found


def points(part: Mapping[str, Any]) -> list[dict[str, tuple[str, Any]]]:
    """The runs of a part: axis -> (name, value). ACDC takes thresholds; methods that score edges ``edges`` if given.

    Raises PahqError for a method that lacks a size.
    """
    found = []
    axes = ("tasks", "models", "metrics", "methods", "policies")
    for chosen in product(*(part[axis].items() for axis in axes)):
        point = dict(zip(axes, chosen, strict=True))
        method = get_method(point["methods"][1])
        key = "edges" if method.scores_edges and part["edges"] else "thresholds"
        sizes = [(key, size) for size in part[key].items()]
        if not sizes and not method.sets_threshold(part["options"].get("method_options") or {}):
            hint = "give thresholds or edges" if method.scores_edges else "give thresholds"
            raise PahqError(f"{part['where']}: thresholds: method {method.name} needs some; {hint}")
        found += [point | {key: size} for key, size in sizes] or [point]
    return found


def label(value: str) -> str:
    """What a model, task or policy is called in names: the last part of a path, without the ending of a file."""
    name = value.rstrip("/").rpartition("/")[2] or value
    ending = next((ending for ending in _FILES if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)] or name


def _part(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in _REQUIRED:
        if given.get(key) is None:
            example = {"tasks": "ioi", "models": "smollm2-135m"}[key]
            raise PahqError(f"{where}: {key}: is missing; write for example '{key}: [{example}]'")
    name = given.get("name", "")
    if not isinstance(name, str):
        raise PahqError(f"{where}: name: {name!r} is no text; put it in quotes")
    axes = {key: _axis(key, given.get(key), where) for key in AXES.values()}
    for method in axes["methods"].values():
        if method not in METHODS:
            raise PahqError(f"{where}: methods: '{method}' is unknown; known: {', '.join(METHODS)}")
    return {**axes, "name": name, "options": given.get("options") or {}, "where": where}


def _axis(key: str, given: Any, where: str) -> dict[str, Any]:
    """name -> value of one list of a grid; empty where there is none."""
    if given is None:
        given = _DEFAULTS.get(key, [])
    elif key == "thresholds" and isinstance(given, Mapping):
        given = _spread(given, f"{where}: {key}")
    elif isinstance(given, Mapping):
        if key not in NAMED:
            raise PahqError(f"{where}: {key}: {dict(given)!r} are names; give plain values, as in '[a, b]'")
        if not all(isinstance(name, str) and name for name in given):
            raise PahqError(f"{where}: {key}: {dict(given)!r}: names must be text; put them in quotes")
    if isinstance(given, Mapping):
        pairs = [(name, _value(key, value, where)) for name, value in given.items()]
    else:
        values = [_value(key, value, where) for value in (given if isinstance(given, list | tuple) else [given])]
        pairs = [(label(value) if key in NAMED else _shown(value), value) for value in values]
    if not pairs and key not in NUMBERS:
        raise PahqError(f"{where}: {key}: the list is empty; give at least one value, or leave the key out")
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found and found[name] == value:
            raise PahqError(f"{where}: {key}: {value!r} is there twice; remove one")
        if name in found:
            mend = f"name them: '{key}: {{first: {found[name]}, second: {value}}}'"
            raise PahqError(f"{where}: {key}: '{found[name]}' and '{value}' are both called '{name}'; {mend}")
        found[name] = value
    return found


def _value(key: str, value: Any, where: str) -> Any:
    """One value of a list; raises PahqError where it is not of the kind that the key lists."""
    if key not in NUMBERS:
        if key == "metrics" and value == OWN:
            return None
        if not isinstance(value, str | Path) or not str(value):
            raise PahqError(f"{where}: {key}: {value!r} is no name; give text (in quotes, if YAML reads it otherwise)")
        if not str(value).isprintable():  # a file name may hold bytes that are no text, which no record can keep
            raise PahqError(f"{where}: {key}: {str(value)!r} holds what cannot be printed; rename the file")
        return str(value)
    try:  # YAML reads 1e-6 as text
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if key == "edges":
        if not (number >= 1 and number == int(number)):
            raise PahqError(f"{where}: edges: {value!r} is no number of edges; give a whole number of at least 1")
        return int(number)
    if not 0 <= number < math.inf:
        raise PahqError(f"{where}: thresholds: {value!r} is no finite number of at least 0; give one such as 0.05")
    return number


def _spread(given: Mapping[str, Any], where: str) -> list[float]:
    """``{from: 1e-4, to: 1, points: 21}``: so many thresholds in equal logarithmic steps."""
    if set(given) != {"from", "to", "points"}:
        raise PahqError(f"{where}: {dict(given)!r} is no range; write for example {{from: 1e-4, to: 1, points: 21}}")
    low, high = (_value("thresholds", given[name], f"{where}: {name}") for name in ("from", "to"))
    count = given["points"]
    if type(count) is not int or count < 2:
        raise PahqError(f"{where}: points: {count!r} is no number of points; give a whole number of at least 2")
    if not 0 < low < high:
        raise PahqError(f"{where}: from {low:g} to {high:g}: give two numbers above 0, the smaller one first")
    return [float(f"{value:.6g}") for value in np.geomspace(low, high, count)]  # as they stand in names


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_keys(given: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise PahqError(f"{where}: '{key}' is unknown; {hint}")
