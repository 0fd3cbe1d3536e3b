"""What a run ran on: versions, processor, memory, and the rate of multiplication this machine reaches."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Versions of python, pahq and the packages that decide its numbers."""
    found = {"python": platform.python_version()}
    for package in ("pahq", "torch", "transformers", "tokenizers", "numpy", "safetensors"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """The git commit of pahq's own source tree (``-dirty`` where it was changed), None outside of one."""
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    # A copy in site-packages may lie inside somebody else's repository, whose commit would be misleading.
    if package.parent.name != "src" or not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and how torch uses it."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def peak_memory(device: torch.device) -> dict[str, int]:
    """Largest memory this process has held so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts KiB on Linux, bytes on macOS
    found = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        found["device_bytes"] = int(torch.cuda.max_memory_allocated(device))
    return found


def gemm_peak(device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 0.5) -> float:
    """FLOP/s of the best of many square matrix products, repeated for about ``seconds``.

    A multiply and its add count as two operations, as in ``pahq.engine.flops``.
    """
    size = 4096 if device.type == "cuda" else 1024
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=draw).to(device, dtype) for _ in range(2))
    out = torch.empty_like(a)

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()  # the first product sets up threads and caches
    best, end = once(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, once())
    return 2.0 * size**3 / best
