"""One run of a sweep: ``python -m pahq.sweeps.job discover …`` is ``python -m pahq discover …``, but for its end.

It ends with the sweep that started it, however that ended: standard input is a pipe that the sweep holds open.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading


def _end_with_parent() -> None:
    while True:
        try:
            if not os.read(0, 1):  # the system closed the other end
                os.kill(os.getpid(), signal.SIGKILL)
        except InterruptedError:
            continue


def main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("pahq", run_name="__main__")


if __name__ == "__main__":
    main()
