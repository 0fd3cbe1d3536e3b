"""Hypothesis strategies: tiny random models over every architecture feature, prompts and options for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from pahq.graph import Graph
from pahq.method.acdc import AcdcOptions, HeadOrder, SenderOrder
from pahq.model.config import Activation, ModelConfig, Positions
from pahq.model.transformer import Transformer, build, shapes
from pahq.task.prompts import Prompts

METRICS = ("kl_div", "logit_diff", "docstring", "greaterthan", "nll", "match_nll", "l2", "l2:1,2")


@dataclass(repr=False)
class Case:
    """A model, prompts and all options of a run of ACDC.

    fraction: the threshold as a part of the metric's change when everything is ablated.
    """

    model: Transformer
    prompts: Prompts
    graph: Graph
    metric: str
    ablation: str
    fraction: float
    absolute: bool
    head_order: HeadOrder
    sender_order: SenderOrder
    seed: int = field(default=0)

    def acdc(self, threshold: float, **more: Any) -> AcdcOptions:
        """ACDC's options of this case. more: further ones, such as a policy."""
        mine = {name: getattr(self, name) for name in ("metric", "ablation", "absolute", "head_order", "sender_order")}
        return AcdcOptions(threshold, **mine, **self.graph.options(), **more)

    def __repr__(self) -> str:
        facts: dict[str, Any] = {
            key: value
            for key, value in vars(self).items()
            if key in ("metric", "ablation", "fraction", "absolute", "head_order", "sender_order", "seed")
        }
        return f"Case({facts}, {self.graph.options()}, {self.model.config}, read={self.prompts.read.tolist()})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # a failing case shows its options, not its weights


def random_weights(
    cfg: ModelConfig, seed: int, drop: set[str], dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Weights of order one, with heavy-tailed gains of heads so that some of them matter.

    drop: optional weights that the model lacks, by the last part of their name (``b_Q``, ``ln1.w``).
    """
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for name, (shape, required) in shapes(cfg).items():
        value = torch.randn(*shape, generator=generator, dtype=torch.float64)
        if not required and any(name.endswith(part) for part in drop):
            continue
        last = name.rsplit(".", 1)[-1]
        if last == "inv_freq":
            value = 3.0 ** -torch.arange(shape[0], dtype=torch.float64)
        elif last == "w":
            value = 1 + 0.3 * value
        elif last.startswith("b"):
            value = 0.3 * value
        elif last == "W_O":
            gain = torch.exp(torch.randn(shape[0], 1, 1, generator=generator, dtype=torch.float64))
            value = value * gain / shape[1] ** 0.5
        elif last in ("W_Q", "W_K"):
            value = 1.5 * value / shape[1] ** 0.5
        elif last.startswith("W_") and last not in ("W_E", "W_pos"):
            value = value / shape[-2] ** 0.5
        if cfg.norm == "none" and last in ("W_O", "W_in", "W_gate", "W_out"):
            value = 0.4 * value  # nothing else keeps the residual stream from growing
        if last == "W_U" and shape[1] > 100:
            value = 3 * value  # a few likely tokens and a long tail
        out[name] = value.to(dtype)
    return out


@st.composite
def models(draw: st.DrawFn, dtype: torch.dtype = torch.float64, vocab: int = 12) -> Transformer:
    """A Transformer of 1 to 3 layers with any combination of features. vocab: tokens it knows."""
    flag, pick = st.booleans(), st.sampled_from
    layers = draw(pick([1, 2, 2, 3, 3]))
    groups, size = draw(pick([1, 2, 3])), draw(pick([1, 1, 2]))
    act: Activation = draw(pick(get_args(Activation)))
    positions: Positions = draw(pick(["learned", *get_args(Positions), "rotary"]))
    cfg = ModelConfig(
        n_layers=layers,
        n_heads=groups * size,
        n_kv_heads=groups,
        d_model=10,
        d_head=4,
        d_mlp=draw(pick([0, 7, 7])),
        d_vocab=vocab,
        d_vocab_out=draw(pick([vocab, vocab - 4])),
        n_ctx=8,
        positions=positions,
        rotary_dim=draw(pick([2, 4])) if positions == "rotary" else 0,
        rotary_interleaved=positions == "rotary" and draw(flag),
        rotary_scale=draw(pick([1.0, 1.0, 1.2])) if positions == "rotary" else 1.0,
        norm=draw(pick(["layer", "rms", "none"])),
        act=act,
        gated=act != "solu_ln" and draw(flag),
        parallel=draw(flag),
        causal=draw(pick([True, True, True, False])),
        qk_norm=draw(pick([False, False, True])),
        attn_scale=draw(pick([None, None, 0.8])),
        window=draw(pick([None, None, 2, 3])),
    )
    biases = ["b_Q", "b_K", "b_V", "b_O", "b_in", "b_gate", "b_out", "b_U", ".w", ".b"]
    drop = {name for name in biases if draw(pick([False, False, True]))}
    return build(cfg, random_weights(cfg, draw(st.integers(0, 2**31)), drop, dtype))


@st.composite
def prompt_pairs(draw: st.DrawFn, cfg: ModelConfig, allow_pad: bool) -> Prompts:
    """1 to 4 pairs of 1 to 6 tokens, often with a common prefix; read at the last, several or differing positions."""
    pick = st.sampled_from
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    n, length = draw(pick([1, 2, 3, 4])), draw(pick([1, 2, 3, 4, 5, 6]))
    clean, corrupt = integers(cfg.d_vocab, n, length), integers(cfg.d_vocab, n, length)
    prefix = draw(pick([0, 0, 1, length // 2, length - 1]))
    corrupt[:, :prefix] = clean[:, :prefix]
    pad = None
    lengths = torch.full((n,), length)
    if allow_pad and draw(pick([False, False, True])):
        lengths = 1 + integers(length, n)
        pad = torch.arange(length) >= lengths[:, None]
        clean, corrupt = clean.masked_fill(pad, 0), corrupt.masked_fill(pad, 0)
    kind = draw(pick(["last", "last", "several", "differing"]))
    if kind == "last":
        read, read_mask = lengths[:, None] - 1, torch.ones(n, 1, dtype=torch.bool)
    else:
        count = draw(st.integers(1, 2)) if kind == "differing" else 3
        read = integers(1000, n, count) % lengths[:, None]
        read_mask = integers(3, n, count) > 0
        read_mask[:, 0] = True
    shape = (*read.shape, 1)
    first = integers(cfg.d_vocab_out, *shape)
    answers = torch.cat((first, (first + 1) % cfg.d_vocab_out), dim=-1)
    wrong = torch.cat(((first + 2) % cfg.d_vocab_out, (first + 3) % cfg.d_vocab_out), dim=-1)
    if draw(st.booleans()):  # ragged: some have one answer only
        answers[..., 1][integers(2, *read.shape) == 0] = -1
        wrong[..., 1][integers(2, *read.shape) == 0] = -1
    return Prompts(clean, corrupt, read, read_mask, answers, wrong, pad)


@st.composite
def cases(
    draw: st.DrawFn, dtype: torch.dtype = torch.float64, vocab: int = 12, metrics: tuple[str, ...] = METRICS
) -> Case:
    """Everything that a run of ACDC depends on."""
    pick = st.sampled_from
    model = draw(models(dtype, vocab))
    ablation = draw(pick(["resample", "resample", "zero", "mean"]))
    # without a causal mask, padding would be attended to: no task makes such prompts
    prompts = draw(prompt_pairs(model.config, allow_pad=model.config.causal and ablation != "mean"))
    graph = Graph(
        model.config,
        split_qkv=draw(pick([True, True, False])),
        direct_edges=draw(pick([True, True, False])),
        split_pos=model.config.positions == "learned" and draw(st.booleans()),
    )
    return Case(
        model=model,
        prompts=prompts,
        graph=graph,
        metric=draw(pick(metrics)),
        ablation=ablation,
        fraction=draw(pick([0.3, 0.1, 0.03, 0.01, 0.001])),
        absolute=draw(st.booleans()),
        head_order=draw(pick(["descending", "ascending"])),
        sender_order=draw(pick(["latest", "latest", "earliest"])),
        seed=draw(st.integers(0, 2**31)),
    )


def drawn(count: int) -> settings:
    """The same ``count`` cases in every run; no shrinking, whose time would be without bound."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
