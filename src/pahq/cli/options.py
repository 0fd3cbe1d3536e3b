"""Options that several commands share."""

from __future__ import annotations

import math
from contextlib import suppress

from pahq.errors import PahqError


def method_options(given: list[str]) -> dict[str, bool | int | float | str]:
    """``["steps=10", "rate=0.1"]`` -> ``{"steps": 10, "rate": 0.1}``.

    Raises PahqError for what is not NAME=VALUE; the method itself judges names and values.
    """
    options: dict[str, bool | int | float | str] = {}
    for name, value in task_options(given, "method option", "steps=10").items():
        options[name] = value
        if isinstance(value, str):
            with suppress(ValueError):
                number = float(value)
                options[name] = number if math.isfinite(number) else value
    return options


def task_options(
    given: list[str], what: str = "task option", example: str = "templates=8"
) -> dict[str, bool | int | str]:
    """``["templates=8", "prepend_bos=true"]`` -> ``{"templates": 8, "prepend_bos": True}``.

    what, example: for the error. Raises PahqError for what is not NAME=VALUE; the task itself judges names and values.
    """
    options: dict[str, bool | int | str] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise PahqError(f"{what} '{item}' is not NAME=VALUE; write for example {example}")
        if value.lower() in ("true", "false"):
            options[name] = value.lower() == "true"
        else:
            options[name] = int(value) if value.lstrip("-").isdigit() else value
    return options
