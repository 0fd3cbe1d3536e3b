"""``--config FILE``: options of a command from a file, such as the record of what is to be repeated."""

from __future__ import annotations

import json
from collections.abc import Container
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from pahq.errors import PahqError
from pahq.files import naming, parse_yaml

NESTED = ("task_options", "method_options")
"""Options that are objects in a file; on the command line each of their entries is a flag NAME=VALUE."""
_OBJECT = "object:"  # marks what was given as a Python object, see report.config


def take_config(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of ``--config``: what the file says becomes the default of each option.

    It must be called before the other options are read (``is_eager``). ``NESTED`` options go to ``context.meta`` by
    their names. Raises PahqError for a file that cannot be read and for options or values that cannot be.
    """
    if path is None:
        return None
    options = {word: param for param in context.command.params for word in _words(param) if word != "config"}
    defaults: dict[str, Any] = {}
    for name, value in read_config(path, context.info_name or "", options).items():
        if value is None:
            continue
        if name in NESTED:
            context.meta[name] = _nested(path, name, value)
            continue
        param: Any = options.get(name.replace("-", "_"))
        if param is None:
            near = get_close_matches(name, [*options, *NESTED], n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"see '{context.command_path} --help'"
            raise PahqError(f"{path}: option '{name}' is unknown; {hint}")
        several = getattr(param, "multiple", False) or param.nargs == -1
        flag = getattr(param, "is_flag", False)
        if several and isinstance(value, list) and value and all(_is_plain(item) for item in value):
            defaults[param.name] = [str(item) for item in value]
            continue
        if several or flag != isinstance(value, bool) or not (flag or _is_plain(value)):
            mend = "a list" if several else "true or false" if flag else "one number or text"
            raise PahqError(f"{path}: {name} is {value!r}; give {mend}")
        if isinstance(value, str) and value.startswith(_OBJECT):
            raise PahqError(
                f"{path}: the {name} was a Python object ({value.removeprefix(_OBJECT)}); name one with --{name}"
            )
        # As text, so that it is judged as a flag's value is: 2.5 is no number of prompts.
        defaults[param.name] = value if isinstance(value, bool) else str(value)
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=take_config,
        is_eager=True,
        help="Options from a YAML or JSON file, or a record such as run.json, by their names; flags override them.",
    ),
]


def read_config(path: Path, command: str = "discover", known: Container[str] = ()) -> dict[str, Any]:
    """Options by name from JSON (``.json``) or YAML: the file itself, or what the record of such a command says.

    Of an evaluation's record only ``known`` options count: the rest is what the command always does.
    """
    with naming(path):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
        content = json.loads(text) if path.suffix.lower() == ".json" else parse_yaml(text, path)
    except (ValueError, RecursionError) as error:
        raise PahqError(f"{path}: not valid {'JSON' if path.suffix.lower() == '.json' else 'text'} ({error})") from None
    from pahq.report.results import COMMANDS

    made_by = COMMANDS.get(str(content.get("kind"))) if isinstance(content, dict) else None
    if made_by is not None and isinstance(content.get("options"), dict):
        if command != made_by:
            raise PahqError(f"{path}: the record of pahq {made_by}; give it to that command")
        content = _evaluation(path, content, known)
    elif isinstance(content, dict) and isinstance(content.get("config"), dict):
        content = content["config"]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise PahqError(f"{path}: holds no options; write for example 'threshold: 0.05', or give a run's run.json")
    return content


def _evaluation(path: Path, record: dict[str, Any], known: Container[str]) -> dict[str, Any]:
    runs = record.get("runs")
    if not isinstance(runs, list) or not all(isinstance(row, dict) and isinstance(row.get("run"), str) for row in runs):
        raise PahqError(f"{path}: its runs are missing; the file is damaged")
    options = {name: value for name, value in record["options"].items() if name in known}
    return options | {"runs": [row["run"] for row in runs]}


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def _nested(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(word, str) for word in value):
        raise PahqError(f"{path}: {name} is {value!r}; give an object of names and values")
    return value


def _words(param: Any) -> set[str]:
    """What a parameter may be called in a file: as the function has it, or as the flag without its dashes."""
    flags = [flag.lstrip("-").replace("-", "_") for flag in param.opts if flag.startswith("--")]
    return {param.name, *flags}
