"""The exit codes of every ``pahq`` command.

An exception that is not the user's doing is a bug: Python prints its traceback and exits with 1.
"""

from __future__ import annotations

DONE = 0
"""It did what was asked; also where a run was finished before, and where the reader of the output (head) left."""
BUG = 1
"""A fault of the program itself."""
REFUSED = 2
"""Bad options, input or surroundings; one line on standard error, ``error: ``, names what is wrong and the mend."""
INTERRUPTED = 130
"""Ctrl-C (128 + SIGINT, as shells have it). ``pahq resume RUN`` goes on with what was begun."""
