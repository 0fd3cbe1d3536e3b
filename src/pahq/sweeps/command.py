"""A run of a sweep as the words of ``pahq discover``, and which options all of a sweep's runs may share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pahq.errors import PahqError
from pahq.method.registry import get_method
from pahq.report.config import RunConfig
from pahq.report.tracking.settings import Tracking, tracking_of

AXES = {
    "task": "tasks",
    "model": "models",
    "threshold": "thresholds",
    "edges": "edges",
    "metric": "metrics",
    "method": "methods",
    "policy": "policies",
}
"""Options in which the runs of a sweep differ -> the key of a grid that lists their values."""
_WANDB: dict[str, Any] = {"wandb": bool} | {f"wandb_{f.name}": str for f in fields(Tracking) if f.name != "wandb"}
EXTRAS = {"streams": str, "view": bool, **_WANDB}
"""Options of ``pahq discover`` that change nothing in a circuit, and so are no part of ``RunConfig`` -> their type."""
_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "names and values",
    list: "a list",
}
_OFF = {"absolute": "--signed"}
"""Flags that say no otherwise than with ``--no-``."""


def judged(options: Any, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of ``RunConfig``, those of ``EXTRAS``) among a grid's ``options``.

    where: names the key in errors. Raises PahqError for an option that there is not, or a value of another type.
    """
    if not isinstance(options, Mapping):
        raise PahqError(f"{where}: {options!r} are no names and values; write for example 'n: 16' below it")
    hints = get_type_hints(RunConfig)
    shared = {name: hints[name] for name in hints if name not in AXES}
    config: dict[str, Any] = {}
    extras: dict[str, Any] = {}
    for given, value in options.items():
        name = str(given).replace("-", "_")
        if name in AXES or name in AXES.values():
            key = AXES.get(name, name)
            raise PahqError(f"{where}: '{given}' is no option of all runs; list values under '{key}', beside options")
        if name not in shared and name not in EXTRAS:
            near = get_close_matches(name, [*shared, *EXTRAS], n=1)
            hint = f"did you mean '{near[0]}'?" if near else "see 'pahq discover --help'"
            raise PahqError(f"{where}: '{given}' is unknown; {hint}")
        hint = shared[name] if name in shared else EXTRAS[name]
        if value is None:
            continue
        if not _fits(value, hint):
            raise PahqError(f"{where}: {given} is {value!r}; give {_wanted(hint)}")
        (config if name in shared else extras)[name] = value
    for name in ("task_options", "method_options"):
        _check_words(config.get(name, {}), name, where)
    try:
        tracking_of(**{name: extras.get(name) for name in _WANDB})
    except PahqError as error:
        raise PahqError(f"{where}: {error}") from None
    return config, extras


def words(config: RunConfig, extras: Mapping[str, Any], out: str) -> list[str]:
    """The run as what follows ``pahq``; what is as it would be anyway is left out."""
    given = {f.name: getattr(config, f.name) for f in fields(config)}
    default = {f.name: {} if f.name.endswith("_options") else f.default for f in fields(config)}
    default["absolute"] = get_method(config.method).by_size
    said = ["discover"]
    for name, value in (*given.items(), *extras.items()):
        if name in extras or (value is not None and value != default[name]):
            said += _words(name, value)
    return [*said, "--out", out]


def _words(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else _OFF.get(name, flag.replace("--", "--no-", 1))]
    if isinstance(value, Mapping):
        single = flag.removesuffix("s")  # one entry a flag
        return [word for key, item in value.items() for word in (single, f"{key}={_text(item)}")]
    if isinstance(value, list | tuple):
        return [word for item in value for word in _words(name, item)]
    text = _text(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def _check_words(values: Mapping[str, Any], name: str, where: str) -> None:
    """Raises PahqError for a nested option that a flag NAME=VALUE cannot say: it would arrive as another value."""
    for key, value in values.items():
        text = _text(value)
        number = text.lstrip("-").isdigit() or text.lower() in ("true", "false")
        if not isinstance(key, str) or "=" in key or not isinstance(value, bool | int | float | str):
            raise PahqError(f"{where}: {name}: {key} is {value!r}; give one number, true, false or text")
        if (isinstance(value, str) and number) or (isinstance(value, float) and name == "task_options"):
            raise PahqError(f"{where}: {name}: {key} is {value!r}, which would be read as another type; give another")


def _kinds(hint: Any) -> tuple[Any, ...]:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(get_origin(kind) or kind for kind in kinds if kind is not NoneType)


def _fits(value: Any, hint: Any) -> bool:
    kinds = _kinds(hint)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def _wanted(hint: Any) -> str:
    return " or ".join(_NAMES[kind] for kind in _kinds(hint))
