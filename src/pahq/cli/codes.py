"""The exit codes of every ``pahq`` command."""

from __future__ import annotations

DONE = 0
"""It did what was asked; also where a run was finished before, and where the reader of the output (head) left."""
BUG = 1
"""A fault of the program itself: Python prints its traceback."""
REFUSED = 2
"""Bad options, input or surroundings; one line on standard error, ``error: ``, names what is wrong and the mend."""
PARTLY = 3
"""All was tried and told, but not all came out: a run of several failed, or a figure lies outside of what it should."""
INTERRUPTED = 130
"""Ctrl-C (128 + SIGINT, as shells have it). ``pahq resume RUN`` goes on with what was begun."""

TOLD = f"""Exit codes: {DONE} done, {BUG} a bug, {REFUSED} refused (one line says why), {PARTLY} done in part (a run of
several failed, a figure lies outside), {INTERRUPTED} interrupted (the same command goes on)."""
"""What ``pahq --help`` says of them."""
