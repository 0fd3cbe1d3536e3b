"""The paper's setting for its ablation of streams: one pass for every edge, as Wang et al. 2025 schedule it.

The whole network runs for each edge: the head under test in FP32, its q, k and v weights copied from page-locked host
memory; all other attention in e4m3, the rest in BF16; then the host reads the metric, as it must to decide. Weights
are random. What an edge patches is left out: it costs the same in all variants.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pahq.precision.buffers import Loader, Slot, assemble, pin
from pahq.precision.matrix import LowMatrix, low_matrix
from pahq.precision.schedule import STREAMS, Done, Scheduler, make_scheduler
from pahq.precision.trace import Trace
from pahq.precision.virtual import VirtualScheduler
from pahq.reproduction.modelled import Edge, Geometry, ModelledNetwork, Rates

VARIANTS = {"all": STREAMS, "no_load": ("low", "high"), "no_split": ("load",), "none": ()}
"""Which of the streams are in use."""


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


def measured_ms(
    geo: Geometry, device: torch.device, batch: int, tokens: int, count: int, repeats: int
) -> tuple[dict[str, float], float, Trace]:
    """Median milliseconds of an edge on a GPU by variant, and of plain FP32 (``fp32``); rounds are interleaved.

    count: edges sampled. -> also the largest difference of a metric between variants, which do the same arithmetic in
    other orders of time, and the trace of a further round with all streams.
    """
    edges = geo.edges(count)
    plain = Network(geo, device, batch, tokens, "fp32", "fp32")
    fp32 = whole_passes(plain, count, 5)
    del plain
    torch.cuda.empty_cache()
    network = Network(geo, device, batch, tokens, "e4m3", "bf16")
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    metrics: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, streams in VARIANTS.items():
            with make_scheduler(device, streams) as scheduler:
                spent, metrics[name] = sweep(scheduler, network, edges, warm=5)
            times[name] += spent
    trace = Trace()
    with make_scheduler(device, STREAMS, trace=trace) as scheduler:
        sweep(scheduler, network, edges)
    ms = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    worst = max(abs(a - b) for name in VARIANTS for a, b in zip(metrics[name], metrics["none"], strict=True))
    return ms | {"fp32": statistics.median(fp32) * 1e3}, worst, trace


def modelled_ms(
    geo: Geometry, rates: Rates, batch: int, tokens: int, count: int
) -> tuple[dict[str, float], dict[str, Trace]]:
    """The same table on a clock, from stated rates; -> also the trace of each variant."""
    edges, ms, traces = geo.edges(count), dict[str, float](), dict[str, Trace]()
    for name, streams in VARIANTS.items():
        network = ModelledNetwork(geo, rates, batch, tokens, "e4m3", "bf16")
        traces[name], times = Trace(), list[float]()
        scheduler = VirtualScheduler(streams, traces[name])
        loader = Loader(scheduler, network.head_weights(edges).__getitem__, copy=True, copier=network.copier)
        for edge, following in zip(edges, [*edges[1:], None], strict=True):
            start = scheduler.host
            scheduler.read(issue(scheduler, loader, network, edge, following))
            times.append(scheduler.host - start)
        ms[name] = statistics.median(times) * 1e3
    plain = ModelledNetwork(geo, rates, batch, tokens, "fp32", "fp32").whole()()
    return ms | {"fp32": max(plain.device, plain.host) * 1e3}, traces
