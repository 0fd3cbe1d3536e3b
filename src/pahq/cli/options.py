"""Options that several commands share."""

from __future__ import annotations

from pahq.errors import PahqError


def task_options(given: list[str]) -> dict[str, bool | int | str]:
    """``["templates=8", "prepend_bos=true"]`` -> ``{"templates": 8, "prepend_bos": True}``.

    Raises PahqError for what is not NAME=VALUE; the task itself judges names and values.
    """
    options: dict[str, bool | int | str] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise PahqError(f"task option '{item}' is not NAME=VALUE; write for example templates=8")
        if value.lower() in ("true", "false"):
            options[name] = value.lower() == "true"
        else:
            options[name] = int(value) if value.lstrip("-").isdigit() else value
    return options
