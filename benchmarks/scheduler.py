"""What the three streams gain: the ablation of Wang et al. 2025, at the geometry of GPT-2 small, a 1B and an 8B model.

The paper's setting: for every edge, one at a time, the whole network; the head under test in FP32, its q, k and v
weights copied from page-locked host memory for that edge; all other attention in e4m3, the rest in BF16; then the
host reads the metric, as it must to decide. Weights are random. What an edge patches is left out: it costs the same in
all variants. Variants:

  all       copies, low and high work each on a stream; the next head is copied ahead
  no_load   the copy is synchronous, on the caller's stream; low and high have theirs
  no_split  copies on a stream of their own, ahead; low and high work one after the other
  none      synchronous copy, then low, then high, on one stream
  fp32      no low precision at all, one stream, no copies: ACDC itself (the paper's row "none" has ACDC's time)

On a GPU these run. Without one the same schedule runs on a clock, from the rates given as options: those figures are
*modelled* (named so), and streams do not slow each other in them. A small network on worker threads then shows that
copies and low work do run at the same time.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from common import finish, header, parser
from pahq.precision.schedule import STREAMS, make_scheduler
from pahq.precision.trace import Trace
from pahq.report.machine import describe
from pahq.reproduction.modelled import SIZES, TINY, Rates
from pahq.reproduction.streams import Network, measured_ms, modelled_ms, sweep
from streams_engine import sweeps as engine_sweeps


def measured(size: str, given: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """The ablation on a GPU: median milliseconds of an edge by variant, rounds of all variants interleaved."""
    geo, device = SIZES[size], torch.device("cuda", 0)
    ms, worst, trace = measured_ms(geo, device, given.batch, given.tokens, given.edges, given.repeats)
    details = {
        "ms": ms,
        "largest_metric_difference": worst,
        "traced": {
            "busy_ms": {name: trace.busy(name) * 1e3 for name in STREAMS},
            "overlap_load_low_ms": trace.overlap("load", "low") * 1e3,
            "overlap_high_low_ms": trace.overlap("high", "low") * 1e3,
        },
        "weight_bytes_per_edge": 3 * geo.d * geo.d_head * 4,
    }
    if given.trace is not None:
        trace.write(given.trace / f"{size}.json")
    show(size, ms, "measured")
    return figures(size, ms, ""), details


def modelled(size: str, given: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """The same table on a clock, from the stated rates."""
    flops = {"e4m3": given.fp8_tflops * 1e12, "bf16": given.bf16_tflops * 1e12, "fp32": given.fp32_tflops * 1e12}
    rates = Rates(given.pcie_gbs * 1e9, given.memory_gbs * 1e9, flops, given.kernel_us * 1e-6, given.launch_us * 1e-6)
    ms, traces = modelled_ms(SIZES[size], rates, given.batch, given.tokens, given.edges)
    if given.trace is not None:
        for name, trace in traces.items():
            trace.write(given.trace / f"modelled_{size}_{name}.json")
    show(size, ms, "modelled")
    overlaps = {name: trace.overlap("load", "low") * 1e3 for name, trace in traces.items()}
    return figures(size, ms, "modelled_"), {"ms": ms, "overlap_load_low_ms": overlaps}


def figures(size: str, ms: dict[str, float], prefix: str) -> dict[str, float]:
    named = {f"{prefix}ms_{name}_{size}": value for name, value in ms.items()}
    speedups = {
        f"{prefix}speedup_streams_{size}": ms["none"] / ms["all"],
        f"{prefix}speedup_over_fp32_{size}": ms["fp32"] / ms["all"],
    }
    return named | speedups


def show(size: str, ms: dict[str, float], how: str) -> None:
    print(f"  {size:5} {how}: " + ", ".join(f"{name} {value:.3f}" for name, value in ms.items()) + " ms an edge; all "
          f"streams {ms['none'] / ms['all']:.2f} times as fast as none, {ms['fp32'] / ms['all']:.2f} times as fast as "
          "fp32", flush=True)  # fmt: skip


def threaded(given: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """A small network on worker threads: the same metrics as in order, copies and low work at the same time."""
    network = Network(TINY, torch.device("cpu"), 8, 12, "e4m3", "bf16")
    edges, trace = TINY.edges(16), Trace()
    with make_scheduler("cpu") as scheduler:
        _, plain = sweep(scheduler, network, edges)
    with make_scheduler("cpu", threads=True, trace=trace) as scheduler:
        _, found = sweep(scheduler, network, edges)
    if found != plain:
        raise SystemExit("error: worker threads gave other metrics than the same calls in order")
    busy = {name: trace.busy(name) * 1e3 for name in STREAMS}
    overlap = trace.overlap("load", "low") * 1e3
    if given.trace is not None:
        trace.write(given.trace / "threads.json")
    print(f"  worker threads, small network: metrics equal bit for bit; load busy {busy['load']:.2f} ms, "
          f"{overlap:.2f} ms of it while low worked")  # fmt: skip
    return {"threads_overlap_load_low": overlap / busy["load"]}, {"busy_ms": busy, "overlap_load_low_ms": overlap}


def options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--sizes", default="gpt2,1b,8b", help="any of gpt2,1b,8b")
    made.add_argument("--edges", type=int, default=50, help="edges sampled, spread over all heads (default 50)")
    made.add_argument("--repeats", type=int, default=3, help="rounds over all variants, on a GPU (default 3)")
    made.add_argument("--batch", type=int, default=50, help="prompts (default 50, the paper's)")
    made.add_argument("--tokens", type=int, default=15, help="tokens of a prompt (default 15)")
    made.add_argument("--engine", default="gpt2,1b", help="sizes swept with the engine, on a GPU (default gpt2,1b)")
    made.add_argument("--engine-tests", type=int, default=1000, help="edges of such a sweep (default 1000)")
    made.add_argument("--trace", type=Path, metavar="FOLDER", help="write Chrome traces there")
    rates = made.add_argument_group("rates of the modelled device (defaults: about an H100's; stated, not measured)")
    rates.add_argument("--pcie-gbs", type=float, default=50.0, help="host to device, GB/s")
    rates.add_argument("--memory-gbs", type=float, default=3000.0, help="device memory, GB/s")
    rates.add_argument("--fp8-tflops", type=float, default=1000.0)
    rates.add_argument("--bf16-tflops", type=float, default=600.0)
    rates.add_argument("--fp32-tflops", type=float, default=50.0)
    rates.add_argument("--kernel-us", type=float, default=2.0, help="the shortest kernel")
    rates.add_argument("--launch-us", type=float, default=4.0, help="host time to launch a kernel")
    given = made.parse_args()
    for size in given.sizes.split(","):
        if size not in SIZES:
            made.error(f"size '{size}' is unknown; give any of {','.join(SIZES)}")
    if given.edges < 1 or given.repeats < 1:
        made.error("--edges and --repeats must be at least 1")
    if given.trace is not None and not given.trace.is_dir():
        made.error(f"{given.trace}: there is no such folder")
    return given


def main() -> None:
    given, facts = options(), header()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        facts["gpu"] = describe(torch.device("cuda", 0))
        print(f"on {facts['gpu']['gpu']}")
    print(f"{given.edges} edges, one at a time, {given.batch} prompts of {given.tokens} tokens; medians")
    found: dict[str, float] = {}
    details: dict[str, Any] = {"options": {k: str(v) for k, v in vars(given).items()}}
    for size in given.sizes.split(","):
        some, details[size] = (measured if on_gpu else modelled)(size, given)
        found |= some
        if size in given.engine.split(",") and on_gpu:
            device = torch.device("cuda", 0)
            some, details[f"engine_{size}"] = engine_sweeps(
                size, SIZES[size], device, given.batch, given.tokens, given.engine_tests, given.repeats
            )
            found |= some
    some, details["engine_tiny"] = engine_sweeps("tiny", TINY, torch.device("cpu"), 8, 12, 200, given.repeats)
    found |= some
    some, details["threads"] = threaded(given)
    finish(given.out, facts, found | some, details)


if __name__ == "__main__":
    main()
