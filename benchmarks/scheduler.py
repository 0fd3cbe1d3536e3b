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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import finish, header, median, parser
from modelled import SIZES, TINY, Edge, Geometry, ModelledNetwork, Rates
from pahq.precision.buffers import Loader, Slot, assemble, pin
from pahq.precision.matrix import LowMatrix, low_matrix
from pahq.precision.schedule import STREAMS, Done, Scheduler, make_scheduler
from pahq.precision.trace import Trace
from pahq.precision.virtual import VirtualScheduler
from pahq.report.machine import describe
from streams_engine import sweeps as engine_sweeps

VARIANTS = {"all": STREAMS, "no_load": ("low", "high"), "no_split": ("load",), "none": ()}


class Network:
    """The work itself: random weights on a device. Every method gives a call for the scheduler.

    attention, rest: formats. x [n, d] float32 is the residual stream of n = batch * tokens rows.
    """

    def __init__(self, geo: Geometry, device: torch.device, batch: int, tokens: int, attention: str, rest: str) -> None:
        self.geo, self.shape, self.device = geo, (batch, tokens), device
        self._draw = torch.Generator(device).manual_seed(0)
        d, wide = geo.d, geo.heads * geo.d_head
        # Queries, keys and values of all heads are one product.
        self.qkv = [self._matrix(d, wide + 2 * geo.groups * geo.d_head, attention) for _ in range(geo.layers)]
        self.o = [self._matrix(wide, d, attention) for _ in range(geo.layers)]
        count = 2 if geo.gated else 1
        self.mlp_in = [[self._matrix(d, geo.d_mlp, rest) for _ in range(count)] for _ in range(geo.layers)]
        self.mlp_out = [self._matrix(geo.d_mlp, d, rest) for _ in range(geo.layers)]
        self.unembed = self._matrix(d, geo.vocab, rest)
        self.x = self._random(batch * tokens, d)
        self.clean: Tensor | None = None
        self.clean = self._logits(self._layers(self.x, 0, geo.layers)).log_softmax(-1)

    def _random(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self._draw, device=self.device)

    def _matrix(self, rows: int, columns: int, fmt: str) -> LowMatrix:
        return low_matrix(self._random(rows, columns) * rows**-0.5, fmt)

    def head_weights(self, edges: list[Edge]) -> dict[Edge, tuple[Tensor, ...]]:
        """q, k and v weights [d, d_head] of the heads under test, in (page-locked) host memory."""
        draw = torch.Generator().manual_seed(1)
        shape = (self.geo.d, self.geo.d_head)
        return {
            edge: tuple(pin(torch.randn(shape, generator=draw) * self.geo.d**-0.5, self.device) for _ in "qkv")
            for edge in edges
        }

    def below(self, layer: int) -> Callable[[], Tensor]:
        """All layers before the one under test, in low precision."""
        return lambda: self._layers(self.x, 0, layer)

    def attention(self, below: Done[Tensor], layer: int) -> Callable[[], Tensor]:
        """All heads of the layer in low precision."""
        return lambda: self._attention(below.value, layer)

    def head(self, below: Done[Tensor], slot: Slot, layer: int) -> Callable[[], Tensor]:
        """The head under test in FP32."""

        def call() -> Tensor:
            h = self._norm(below.value).view(*self.shape, -1)
            q, k, v = (h @ weight for weight in slot.tensors)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return call

    def above(
        self, below: Done[Tensor], low: Done[Tensor], high: Done[Tensor], layer: int, head: int
    ) -> Callable[[], Tensor]:
        """Assembly, the rest of the layer, all later layers, and the metric."""

        def call() -> Tensor:
            z = assemble(low.value, head, high.value, dim=1)
            return self._metric(self._layers(self._rest(below.value, z, layer), layer + 1, self.geo.layers))

        return call

    def whole(self) -> Callable[[], Tensor]:
        """The network from one end to the other."""
        return lambda: self._metric(self._layers(self.x, 0, self.geo.layers))

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])

    def _attention(self, x: Tensor, layer: int) -> Tensor:
        """[n, d] -> z [B, H, T, dh]"""
        geo = self.geo
        qkv = self.qkv[layer].multiply(self._norm(x))
        if not self.qkv[layer].fmt.is_exact:
            qkv = qkv.bfloat16()
        heads = qkv.view(*self.shape, -1, geo.d_head).transpose(1, 2)
        q, k, v = heads.split([geo.heads, geo.groups, geo.groups], dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=geo.groups < geo.heads)
        return out.float()

    def _rest(self, x: Tensor, z: Tensor, layer: int) -> Tensor:
        x = x + self.o[layer].multiply(z.transpose(1, 2).reshape(x.shape[0], -1))
        h = self._norm(x)
        hidden = [matrix.multiply(h) for matrix in self.mlp_in[layer]]
        active = F.silu(hidden[0]) * hidden[1] if self.geo.gated else F.gelu(hidden[0], approximate="tanh")
        return x + self.mlp_out[layer].multiply(active)

    def _layers(self, x: Tensor, first: int, stop: int) -> Tensor:
        for layer in range(first, stop):
            x = self._rest(x, self._attention(x, layer), layer)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return self.unembed.multiply(self._norm(x.view(*self.shape, -1)[:, -1]))

    def _metric(self, x: Tensor) -> Tensor:
        """KL divergence from the clean run at the last position, a scalar on the device."""
        assert self.clean is not None
        return F.kl_div(self._logits(x).log_softmax(-1), self.clean, log_target=True, reduction="batchmean")


def issue(scheduler: Scheduler, loader: Loader[Edge], network: Any, edge: Edge, following: Edge | None) -> Done[Any]:
    """One edge's pass, as the paper schedules it; -> the metric. The same for real and for modelled work."""
    layer, head = edge
    slot = loader.fetch(edge)
    if following is not None:
        loader.prefetch(following)
    below = scheduler.submit("low", f"layers below {layer}", network.below(layer))
    low = scheduler.submit("low", f"heads of layer {layer}", network.attention(below, layer), [below])
    high = scheduler.submit("high", f"head a{layer}.{head}", network.head(below, slot, layer), [below, slot.ready])
    slot.release(high)
    above = network.above(below, low, high, layer, head)
    metric = scheduler.submit("low", f"layers from {layer}", above, [below, low, high])
    scheduler.join(metric)
    return metric


def sweep(scheduler: Scheduler, network: Network, edges: list[Edge], warm: int = 0) -> tuple[list[float], list[float]]:
    """Seconds and metric of every edge; the first ``warm`` edges run once before."""
    loader = Loader(scheduler, network.head_weights(edges).__getitem__, copy=True)
    times, metrics = [], []
    for index, edge in enumerate([*edges[:warm], *edges]):
        start = time.perf_counter()
        place = index if index < warm else index - warm
        done = issue(scheduler, loader, network, edge, edges[place + 1] if place + 1 < len(edges) else None)
        metrics.append(float(done.value))  # the host waits, for the decision
        times.append(time.perf_counter() - start)
    return times[warm:], metrics[warm:]


def whole_passes(network: Network, count: int, warm: int) -> list[float]:
    """Seconds of plain passes, each read by the host."""
    times, call = [], network.whole()
    with torch.no_grad():
        for _ in range(count + warm):
            start = time.perf_counter()
            float(call())
            times.append(time.perf_counter() - start)
    return times[warm:]


def measured(size: str, given: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """The ablation on a GPU: median milliseconds of an edge by variant, rounds of all variants interleaved."""
    geo, device = SIZES[size], torch.device("cuda", 0)
    edges = geo.edges(given.edges)
    plain = Network(geo, device, given.batch, given.tokens, "fp32", "fp32")
    fp32 = whole_passes(plain, given.edges, 5)
    del plain
    torch.cuda.empty_cache()
    network = Network(geo, device, given.batch, given.tokens, "e4m3", "bf16")
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    metrics: dict[str, list[float]] = {}
    for _ in range(given.repeats):
        for name, streams in VARIANTS.items():
            with make_scheduler(device, streams) as scheduler:
                spent, metrics[name] = sweep(scheduler, network, edges, warm=5)
            times[name] += spent
    trace = Trace()
    with make_scheduler(device, STREAMS, trace=trace) as scheduler:
        sweep(scheduler, network, edges)
    ms = {name: median(values) * 1e3 for name, values in times.items()} | {"fp32": median(fp32) * 1e3}
    worst = max(abs(a - b) for name in VARIANTS for a, b in zip(metrics[name], metrics["none"], strict=True))
    details = {
        "ms": ms,
        "largest_metric_difference": worst,  # variants do the same arithmetic in other orders of time
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
    geo = SIZES[size]
    flops = {"e4m3": given.fp8_tflops * 1e12, "bf16": given.bf16_tflops * 1e12, "fp32": given.fp32_tflops * 1e12}
    rates = Rates(given.pcie_gbs * 1e9, given.memory_gbs * 1e9, flops, given.kernel_us * 1e-6, given.launch_us * 1e-6)
    edges, ms, traced = geo.edges(given.edges), dict[str, float](), dict[str, float]()
    for name, streams in VARIANTS.items():
        network = ModelledNetwork(geo, rates, given.batch, given.tokens, "e4m3", "bf16")
        trace, times = Trace(), []
        scheduler = VirtualScheduler(streams, trace)
        loader = Loader(scheduler, network.head_weights(edges).__getitem__, copy=True, copier=network.copier)
        for edge, following in zip(edges, [*edges[1:], None], strict=True):
            start = scheduler.host
            scheduler.read(issue(scheduler, loader, network, edge, following))
            times.append(scheduler.host - start)
        ms[name] = median(times) * 1e3
        traced[name] = trace.overlap("load", "low") * 1e3
        if given.trace is not None:
            trace.write(given.trace / f"modelled_{size}_{name}.json")
    plain = ModelledNetwork(geo, rates, given.batch, given.tokens, "fp32", "fp32").whole()()
    ms["fp32"] = max(plain.device, plain.host) * 1e3
    show(size, ms, "modelled")
    return figures(size, ms, "modelled_"), {"ms": ms, "overlap_load_low_ms": traced}


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
    made.formatter_class = argparse.RawDescriptionHelpFormatter
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
