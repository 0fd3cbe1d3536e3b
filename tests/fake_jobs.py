"""In the place of a sweep's processes: ``python fake_jobs.py discover … --out FOLDER`` does what the run's name says.

Threshold 0.1 is a run that ends well, whose files are those of the finished run that FAKE_RUN names.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

words = sys.argv[1:]
out, threshold = Path(words[words.index("--out") + 1]), words[words.index("--threshold") + 1]
print("loading …", flush=True)
place = Path(os.environ["FAKE_RUN"]).parent
(place / f"{out.name}-{os.getpid()}.began").write_text(os.environ["OMP_NUM_THREADS"])
if threshold == "0.2":
    sys.exit("error: prompts: there is <b>none</b>; give some")
if threshold == "0.3":
    os.kill(os.getpid(), signal.SIGKILL)
if threshold == "0.4":
    raise TypeError("a bug")
if threshold == "0.5":
    time.sleep(600)  # until it is interrupted
if threshold == "0.6":
    sys.exit(0)  # and leaves nothing
others = place / "together"
if others.exists():  # ends once two have begun, and so only where two run at a time
    end = time.monotonic() + float(others.read_text())
    while len(list(place.glob("*.began"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    if len(list(place.glob("*.began"))) < 2:
        sys.exit("error: alone")
shutil.copytree(os.environ["FAKE_RUN"], out, dirs_exist_ok=True)
