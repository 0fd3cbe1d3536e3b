"""Training of models with known circuits: its network is our transformer, and the same seed gives the same weights."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pahq.engine.full import patched_logits
from pahq.graph import Graph
from pahq.model import ModelConfig, build
from pahq.precision.formats import get_format, round_to
from pahq.task.prompts import last_position

TRAINING = Path(__file__).resolve().parents[1] / "training"


def neighbour(name: str) -> Any:
    """A module of the training script's folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"training_{name}", TRAINING / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


Network = neighbour("network").Network


def network(seed: int, positions: int = 5, offset: float = 0.0) -> Any:
    cfg = ModelConfig(
        n_layers=3,
        n_heads=2,
        n_kv_heads=2,
        d_model=8,
        d_head=4,
        d_mlp=12,
        d_vocab=9,
        d_vocab_out=9,
        n_ctx=positions,
        act="gelu",
    )
    draw = torch.Generator().manual_seed(seed)
    made = Network(cfg, draw, offset=offset)
    for name, weight in made.weights.items():  # biases and norms that matter
        if weight.ndim == 1 or ".b_" in name:
            weight.data += 0.3 * torch.randn(weight.shape, generator=draw)
    return made


@pytest.mark.parametrize("seed", range(4))
def test_network_is_our_transformer_under_any_gates(seed: int) -> None:
    made = network(seed)
    model = build(made.config, made.weights)
    draw = torch.Generator().manual_seed(100 + seed)
    tokens = torch.randint(9, (6, 5), generator=draw)
    plain = made.run(tokens)
    torch.testing.assert_close(plain.logits, model.forward(tokens)[:, -1], rtol=1e-4, atol=1e-5)
    graph = Graph(made.config)
    partner = torch.arange(6) ^ 1
    gates = (torch.rand(6, *graph.shape, generator=draw) < 0.7).float()
    patched = made.run(tokens, gates, plain.of(partner))
    for example in range(6):
        one = slice(example, example + 1)
        prompts = last_position(tokens[one], tokens[partner][one], [[0]], [[1]])
        mask = graph.edges & gates[example].bool().numpy()
        expected = patched_logits(model, prompts, graph, mask)[0, 0]
        torch.testing.assert_close(patched.logits[example], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(patched.logits, plain.logits, atol=1e-2)
    assert np.isfinite(patched.logits.detach().numpy()).all()


def test_seeds_differ() -> None:
    assert not torch.equal(network(0).weights["embed.W_E"], network(1).weights["embed.W_E"])


@torch.no_grad()
def test_an_offset_of_the_stream_is_nothing_to_layer_norm_and_everything_to_rounded_sums() -> None:
    plain, moved = network(0), network(0, offset=50.0)
    tokens = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(1))
    streams = [made.run(tokens).read[-1] for made in (plain, moved)]
    assert (streams[1] - streams[0]).mean() == pytest.approx(50, abs=1e-3)
    torch.testing.assert_close(moved.run(tokens).logits, plain.run(tokens).logits, rtol=1e-3, atol=1e-4)
    kept = [round_to(stream, get_format("e4m3-unscaled")) for stream in streams]
    assert len(kept[0].unique()) > 20
    assert len(kept[1].unique()) < 5  # steps of 4 from 32 on, and of 2 below


def test_gradients_flow_through_both_runs() -> None:
    made = network(0)
    tokens = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(1))
    plain = made.run(tokens)
    gates = torch.zeros(4, *made.graph.shape)
    made.run(tokens, gates, plain.of(torch.arange(4) ^ 1)).logits.sum().backward()
    written = made.weights["blocks.0.mlp.W_out"].grad  # all gates are 0: the source's run alone remains
    assert written is not None
    assert written.abs().max() > 0


def short(folder: Path) -> dict:
    command = [sys.executable, str(TRAINING / "siit.py"), "maximum", "--steps", "4", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "truth.json").read_text())


def test_a_short_training_repeats_itself(tmp_path: Path) -> None:
    facts = short(tmp_path / "a")
    short(tmp_path / "b")
    names = ("model.safetensors", "truth.json", "losses.csv")
    a, b = ([(tmp_path / run / name).read_bytes() for name in names] for run in "ab")
    assert a == b
    assert facts["facts"]["training"]["steps"] == 4
    assert a[2].decode().splitlines()[0].startswith("step,loss_task,loss_patched")
    assert len(a[2].decode().splitlines()) == 3
