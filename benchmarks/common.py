"""What every benchmark prints and writes: hardware, commit, configuration and named figures."""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pahq.files import write_json
from pahq.report.machine import commit, describe, gemm_peak, versions


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks share; a description is shown with its own lines."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return made


def header() -> dict[str, Any]:
    """Prints and returns what was measured where."""
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "machine": describe(torch.device("cpu")),
        "versions": versions(),
        "gemm_peak_gflops": gemm_peak(torch.device("cpu")) / 1e9,
    }
    machine = facts["machine"]
    print(f"{machine['cpu']}, {machine['cores']} cores, FP32 peak {facts['gemm_peak_gflops']:.0f} GFLOP/s measured now")
    print(f"commit {facts['commit']}, torch {facts['versions']['torch']}")
    return facts


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median(values: list[float]) -> float:
    return statistics.median(values)


def finish(out: Path | None, facts: dict[str, Any], figures: dict[str, float], details: dict[str, Any]) -> None:
    """Prints the figures and writes everything as JSON where asked to."""
    print("\nfigures")
    for name, value in figures.items():
        print(f"  {name:32} {value:.5g}")
    if out is not None:
        write_json(out, {**facts, "figures": figures, "details": details})
        print(f"written to {out}")
