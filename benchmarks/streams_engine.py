"""The streams with our own engine: a sweep under policy ``pahq`` on random weights, with streams on and off."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

from common import median
from pahq.method.acdc import Acdc, AcdcOptions, Progress
from pahq.model import ModelConfig, Transformer, build
from pahq.model.transformer import shapes
from pahq.precision.policy import get_policy
from pahq.precision.schedule import make_scheduler
from pahq.precision.streamed import streamed
from pahq.reproduction.modelled import Geometry
from pahq.reproduction.streams import VARIANTS
from pahq.task.prompts import Prompts, last_position

THRESHOLD = 0.01


class _Enough(Exception):
    pass


def random_model(geo: Geometry, tokens: int) -> Transformer:
    """Random weights in host memory, small enough that effects are of the threshold's size."""
    cfg = ModelConfig(
        geo.layers, geo.heads, geo.groups, geo.d, geo.d_head, geo.d_mlp, geo.vocab, geo.vocab, max(tokens, 32),
        norm="rms" if geo.gated else "layer", act="silu" if geo.gated else "gelu_new", gated=geo.gated, name="random",
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for name, (shape, required) in shapes(cfg).items():
        if required:
            weights[name] = torch.randn(shape, generator=draw) * (1.0 if "embed" in name else shape[-2] ** -0.5)
    return build(cfg, weights, check_values=False)


def random_prompts(geo: Geometry, batch: int, tokens: int) -> Prompts:
    draw = torch.Generator().manual_seed(1)
    clean = torch.randint(0, geo.vocab, (batch, tokens), generator=draw)
    corrupt = clean.clone()
    corrupt[:, tokens // 3] = torch.randint(0, geo.vocab, (batch,), generator=draw)
    return last_position(clean, corrupt, [[]] * batch, [[]] * batch)


def sweeps(
    size: str, geo: Geometry, device: torch.device, batch: int, tokens: int, tests: int, repeats: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Milliseconds a tested edge by variant, over the first ``tests`` edges; medians of interleaved repeats.

    FP32 weights stay in host memory and are streamed, as ``pahq discover --policy pahq --device cuda`` has it.
    """
    model, prompts = random_model(geo, tokens), random_prompts(geo, batch, tokens).to(device)
    took: dict[str, list[float]] = {name: [] for name in VARIANTS}
    after: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, streams in VARIANTS.items():
            with make_scheduler(device, streams) as scheduler:
                there = streamed(model, device, scheduler)
                acdc = Acdc(there, prompts, AcdcOptions(THRESHOLD, policy=get_policy("pahq")), scheduler=scheduler)

                def stop(progress: Progress) -> None:
                    if progress.tested >= tests:
                        raise _Enough

                start = time.perf_counter()
                with contextlib.suppress(_Enough):
                    acdc.run(on_batch=stop)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                took[name].append((time.perf_counter() - start) * 1e3 / len(acdc.decisions))
            values = [decision.after for decision in acdc.decisions]
            if after.setdefault("all", values) != values:
                raise SystemExit(f"error: streams '{name}' gave other metrics than all streams")
    ms = {name: median(values) for name, values in took.items()}
    named = {f"engine_ms_{name}_{size}": value for name, value in ms.items()}
    print(f"  {size:5} with the engine: " + ", ".join(f"{name} {value:.3f}" for name, value in ms.items())
          + f" ms a tested edge ({tests} edges from the output back); all streams {ms['none'] / ms['all']:.2f} times "
          "as fast as none; the same metrics, bit for bit", flush=True)  # fmt: skip
    return named | {f"engine_speedup_streams_{size}": ms["none"] / ms["all"]}, {"ms": took}
