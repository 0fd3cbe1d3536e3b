"""The maths of a block against formulas written out from the definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.model.components import MLP, Norm, Rotary, activate, allowed_keys
from pahq.model.config import Activation, ModelConfig
from pahq.model.transformer import Transformer, build, check_weights
from random_models import random_weights


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(**changes: Any) -> Transformer:
    fixed = {"n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "d_model": 6, "d_head": 4, "d_mlp": 5, "n_ctx": 7}
    cfg = ModelConfig(**{**fixed, "d_vocab": 9, "d_vocab_out": 9, **changes})
    return build(cfg, random_weights(cfg, 5, set()))


def test_norms() -> None:
    x, w, b = normal(3, 4), normal(4, seed=1), normal(4, seed=2)
    rows = []
    for row in x.numpy():
        mean, variance = sum(row) / 4, sum((row - sum(row) / 4) ** 2) / 4
        rows.append((row - mean) / math.sqrt(variance + 1e-3) * w.numpy() + b.numpy())
    np.testing.assert_allclose(Norm("layer", 1e-3, w, b)(x), rows, atol=1e-12)
    rows = [row / math.sqrt(sum(row**2) / 4 + 1e-3) * w.numpy() for row in x.numpy()]
    np.testing.assert_allclose(Norm("rms", 1e-3, w)(x), rows, atol=1e-12)
    assert Norm("none", 1e-3)(x) is x


@pytest.mark.parametrize(
    ("act", "formula"),
    [
        ("relu", lambda x: max(x, 0.0)),
        ("gelu", lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
        ("gelu_new", lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2),
        ("gelu_quick", lambda x: x / (1 + math.exp(-1.702 * x))),
        ("silu", lambda x: x / (1 + math.exp(-x))),
    ],
)
def test_activations(act: Activation, formula: Any) -> None:
    x = 3 * normal(50)
    np.testing.assert_allclose(activate(x, act), [formula(v) for v in x.tolist()], atol=1e-12)


def test_solu_and_its_norm() -> None:
    x, W_in, W_out = normal(3, 4), normal(4, 5, seed=1), normal(5, 4, seed=2)
    ln = Norm("layer", 1e-5, normal(5, seed=3), normal(5, seed=4))
    hidden = x @ W_in
    exp = hidden.exp()
    solu = hidden * exp / exp.sum(-1, keepdim=True)
    torch.testing.assert_close(activate(hidden, "solu"), solu)
    torch.testing.assert_close(MLP("solu_ln", W_in, W_out, ln=ln)(x), ln(solu) @ W_out)
    torch.testing.assert_close(MLP("solu", W_in, W_out)(x), solu @ W_out)


def test_gated_mlp() -> None:
    x, W_in, W_gate, W_out = normal(2, 3, 4), normal(4, 5, seed=1), normal(4, 5, seed=2), normal(5, 4, seed=3)
    b_in, b_gate, b_out = normal(5, seed=4), normal(5, seed=5), normal(4, seed=6)
    gate = x @ W_gate + b_gate
    expected = (gate * torch.sigmoid(gate) * (x @ W_in + b_in)) @ W_out + b_out
    torch.testing.assert_close(MLP("silu", W_in, W_out, W_gate, b_in, b_gate, b_out)(x), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_pairs_by_position_times_frequency(interleaved: bool) -> None:
    cfg: dict[str, Any] = {"positions": "rotary", "rotary_dim": 4, "rotary_interleaved": interleaved, "d_head": 6}
    rotary = model(**cfg, rotary_scale=1.5).rotary
    assert isinstance(rotary, Rotary)
    x, positions = normal(2, 3, 6), torch.tensor([5, 0, 2])
    pairs = [(0, 1), (2, 3)] if interleaved else [(0, 2), (1, 3)]
    expected = x.clone()
    for p, position in enumerate(positions.tolist()):
        for index, (i, j) in enumerate(pairs):
            z = torch.complex(x[:, p, i], x[:, p, j]) * 1.5 * np.exp(1j * position * 3.0**-index)
            expected[:, p, i], expected[:, p, j] = z.real, z.imag
    torch.testing.assert_close(rotary(x, positions), expected, rtol=0, atol=1e-6)
    # positions may differ from one example to the next
    each = torch.tensor([[5, 0, 2], [1, 1, 6]])
    turned = torch.stack([rotary(x[n], each[n]) for n in range(2)])
    torch.testing.assert_close(rotary(x, each), turned, rtol=0, atol=0)


def test_rotary_scores_depend_on_distance_only() -> None:
    rotary = model(positions="rotary", rotary_dim=4).rotary
    assert rotary is not None
    q, k = normal(1, 4), normal(1, 4, seed=1)
    scores = [float((rotary(q, torch.tensor([i + 2])) * rotary(k, torch.tensor([i]))).sum()) for i in range(4)]
    assert scores == pytest.approx([scores[0]] * 4, abs=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_visible_keys(causal: bool, window: int | None) -> None:
    query, key = torch.tensor([[0, 3], [2, 5]]), torch.arange(6)
    seen = allowed_keys(query, key, causal, window)
    if seen is None:
        assert not causal
        assert window is None
        return
    for n in range(2):
        for p in range(2):
            for t in range(6):
                distance = int(query[n, p]) - t
                inside = window is None or abs(distance) < window
                assert bool(seen[n, p, t]) == (inside and (distance >= 0 or not causal))


def test_a_window_hides_earlier_tokens_and_causality_later_ones() -> None:
    sighted = model(window=2)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    logits = sighted.forward(tokens)
    for changed, same in ((0, [2, 3, 4]), (4, [0, 1, 2, 3])):
        other = tokens.clone()
        other[0, changed] = 8
        difference = (sighted.forward(other) - logits).abs().amax(-1)[0]
        assert difference[same].max() == 0
        assert difference[changed] > 0


def test_shortformer_adds_positions_to_queries_and_keys_only() -> None:
    short = model(positions="shortformer", norm="none")
    x, where = normal(2, 4, 6), torch.arange(4)
    assert short.W_pos is not None
    for which in "qk":
        torch.testing.assert_close(short.attn_input(x, 0, which, where), x + short.W_pos[:4])
    assert short.attn_input(x, 0, "v", where) is x
    embed, pos = short.embed(torch.zeros(1, 4, dtype=torch.int64))
    assert pos is None
    torch.testing.assert_close(embed, short.W_E[:1].expand(1, 4, -1))


def test_query_and_key_norms_act_on_each_head() -> None:
    attn = model(qk_norm=True, norm="rms").blocks[0].attn
    x = normal(3, 6)
    for which, weight, bias, norm in (("q", attn.W_Q, attn.b_Q, attn.q_norm), ("k", attn.W_K, attn.b_K, attn.k_norm)):
        assert bias is not None
        assert norm is not None
        assert norm.w is not None
        plain = x @ weight[1] + bias[1]
        expected = plain / (plain.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.w
        torch.testing.assert_close(attn.project(x, which, 1), expected)
        torch.testing.assert_close(attn.project_all(x, which)[1], expected)


def test_too_long_prompts_are_refused() -> None:
    with pytest.raises(PahqError, match="8 tokens are more than the 7"):
        model().forward(torch.zeros(1, 8, dtype=torch.int64))


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    cfg = model().config
    weights = random_weights(cfg, 0, set())
    damaged = {**weights, "unembed.W_U": torch.full_like(weights["unembed.W_U"], float("nan"))}
    cases = [
        ({k: v for k, v in weights.items() if k != "embed.W_E"}, r"'embed.W_E' \[9, 6\] is missing"),
        ({**weights, "ln_final.w": torch.ones(5)}, r"'ln_final.w' of model has shape \[5\]"),
        ({**weights, "lm_head.bias": torch.ones(5)}, "'lm_head.bias' is not a weight of model"),
        (damaged, "'unembed.W_U' of model holds NaN"),
    ]
    for broken, message in cases:
        with pytest.raises(PahqError, match=message):
            check_weights(cfg, broken)
    rms = model(norm="rms")
    with pytest.raises(PahqError, match=r"'ln_final.b' is not a weight"):  # RMSNorm has none; it must not be ignored
        check_weights(rms.config, {**rms.weights, "ln_final.b": torch.ones(6)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_kv_heads": 3}, "2 heads do not divide into 3"),
        ({"norm": "batch"}, "norm 'batch' is unknown; known: none, layer, rms"),
        ({"positions": "rotary", "rotary_dim": 6}, r"rotary_dim 6 must lie between 1 and d_head \(4\)"),
        ({"d_mlp": -1}, "d_mlp is -1"),
    ],
)
def test_impossible_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PahqError, match=message):
        model(**change)


def test_models_move_between_precisions() -> None:
    double = model(positions="rotary", rotary_dim=4)
    single = double.to(dtype=torch.float32)
    tokens = torch.tensor([[1, 2, 3]])
    assert single.dtype == torch.float32
    assert single.forward(tokens).dtype == torch.float32
    torch.testing.assert_close(single.forward(tokens).double(), double.forward(tokens), rtol=0, atol=1e-4)
