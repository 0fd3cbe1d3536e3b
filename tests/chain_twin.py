"""Chains of differences the slow way: a state from its parent, a node and a product at a time, at all positions.

Nothing is shared with the engine but rounding to a format, which has tests of its own. A state holds all values of
one pass; every linear map adds to the parent's result the low-precision product of what changed in its input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import oracle
from pahq.engine.reference import reference_run
from pahq.graph import Graph, Receiver, Sender
from pahq.model.transformer import Transformer
from pahq.precision.formats import round_to
from pahq.precision.policy import Policy
from pahq.task.prompts import Prompts

Edge = tuple[int, int]


@dataclass
class Values:
    """All values of one state, by what they are called below; [B, T, …] each."""

    of: dict[Any, Tensor] = field(default_factory=dict)


class ChainTwin:
    """States of one model and prompts under a policy of differences."""

    def __init__(self, model: Transformer, prompts: Prompts, graph: Graph, ablation: str, policy: Policy) -> None:
        self.model, self.prompts, self.graph, self.policy = model, prompts, graph, policy
        self.ablation = ablation
        self.reference = oracle.reference_run(model, graph, prompts, ablation)
        self.clean_run = oracle.forward(model, graph, prompts.clean)
        self.clean = self._state(None, graph.edges, [], None)
        torch.testing.assert_close(self.clean.of["logits"], self.clean_run.logits, rtol=1e-4, atol=1e-4)

    def base(self, mask: np.ndarray) -> Values:
        """The state of a mask in FP32."""
        removed = [(int(r), int(c)) for r, c in np.argwhere(self.graph.edges & ~mask)]
        return self._state(self.clean, mask, removed, None)

    def child(self, parent: Values, mask: np.ndarray, removed: list[Edge], tested: int) -> Values:
        """The state of ``mask``, which lacks ``removed`` beyond its parent, in low precision. tested: a row."""
        return self._state(parent, mask, removed, tested)

    def metric(self, name: str, state: Values) -> float:
        """Sums over the vocabulary from the chain's logits, single logits as they are."""
        prompts, values, clean_nll = self.prompts, [], []
        name, _, dims = name.partition(":")
        for n in range(len(prompts)):
            for p in range(prompts.read.shape[1]):
                if not prompts.read_mask[n, p]:
                    continue
                at = prompts.read[n, p]
                exact, low = (state.of[key][n, at].double() for key in ("exact logits", "logits"))
                then = self.clean_run.logits[n, at].double()
                right = [int(a) for a in prompts.answers[n, p] if a >= 0]
                wrong = [int(a) for a in prompts.wrong[n, p] if a >= 0]
                log_p, total = torch.log_softmax(then, -1), torch.logsumexp(low, -1)
                if name == "kl_div":
                    value = (log_p.exp() * (log_p - (exact - total))).sum()
                elif name == "logit_diff":
                    value = exact[wrong].mean() - exact[right].mean()
                elif name == "docstring":
                    value = exact[wrong].max() - exact[right].mean()
                elif name == "greaterthan":
                    value = (exact[wrong] - total).exp().sum() - (exact[right] - total).exp().sum()
                elif name in ("nll", "match_nll"):
                    value = total - torch.logsumexp(exact[right], 0)
                    clean_nll.append(float(-torch.logsumexp(log_p[right], 0)))
                else:
                    chosen = [int(dim) for dim in dims.split(",")] if dims else list(range(len(low)))
                    value = ((low - then) ** 2)[chosen].mean()
                values.append(float(value))
        mean = sum(values) / len(values)
        return abs(mean - sum(clean_nll) / len(clean_nll)) if name == "match_nll" else mean

    # --- one state ------------------------------------------------------------------------------------------

    def _state(self, parent: Values | None, mask: np.ndarray, removed: list[Edge], tested: int | None) -> Values:
        cfg, weights, graph, now = self.model.config, self.model.weights, self.graph, Values()
        self.parent, self.now, self.tested = parent, now, tested
        tokens = self.prompts.clean
        where = torch.arange(tokens.shape[1])
        token = weights["embed.W_E"][tokens]
        stream = token
        if cfg.positions == "learned":
            place = weights["pos_embed.W_pos"][where].expand_as(token)
            stream = token + place
            if graph.split_pos:
                now.of[Sender("pos_embed", -1)] = place
        now.of[Sender("embed", -1)] = token if graph.split_pos else stream

        def norm(x: Tensor, name: str, kind: str = cfg.norm) -> Tensor:
            return oracle.norm(x, kind, cfg.norm_eps, weights.get(f"{name}.w"), weights.get(f"{name}.b"))

        def read(receiver: Receiver, residual: Tensor) -> Tensor:
            if parent is not None:
                row = graph.receiver_index[receiver]
                residual = parent.of["x", receiver]
                for edge in removed:
                    if edge[0] == row and edge[1] != graph.direct:
                        residual = residual - self._gap(edge[1], tested is not None)
                for column in np.flatnonzero(mask[row, : graph.n_upstream(receiver)]):
                    sender = graph.senders[column]
                    residual = residual + (now.of[sender] - parent.of[sender])
            now.of["x", receiver] = residual
            return residual

        distance = where[:, None] - where
        visible = (distance >= 0) if cfg.causal else torch.ones_like(distance, dtype=torch.bool)
        if cfg.window is not None:
            visible = visible & (distance.abs() < cfg.window)

        for layer in range(cfg.n_layers):
            at, before = f"blocks.{layer}", stream
            for which, count in (("q", cfg.n_heads), ("k", cfg.n_kv_heads), ("v", cfg.n_kv_heads)):
                for index in range(count):
                    head = index if which == "q" else index * cfg.group_size
                    receiver = oracle.receiver_of(graph, layer, which, head)
                    row = graph.receiver_index[receiver]
                    x = norm(read(receiver, before), f"{at}.ln1")
                    if cfg.positions == "shortformer" and which != "v":
                        x = x + weights["pos_embed.W_pos"][: tokens.shape[1]]
                    name = f"{at}.attn.{{}}_{which.upper()}"
                    bias = weights.get(name.format("b"))
                    key = (layer, which, index)
                    value = self._linear(
                        key, which, x, weights[name.format("W")][index], None if bias is None else bias[index], row
                    )
                    if cfg.qk_norm and which != "v":
                        value = norm(value, f"{at}.attn.{which}_norm", "rms")
                    if parent is not None and graph.direct_edges and not mask[row, graph.direct]:
                        value = self.reference.computed[layer, which, index].expand_as(value)
                    now.of["value", key] = value
            for head in range(cfg.n_heads):
                group = head // cfg.group_size
                q, k = (oracle.turn(now.of["value", (layer, w, i)], self.model) for w, i in (("q", head), ("k", group)))
                scale = cfg.attn_scale if cfg.attn_scale is not None else cfg.d_head**-0.5
                scores = (q @ k.transpose(1, 2) * scale).masked_fill(~visible, -math.inf)
                z = torch.softmax(scores, -1) @ now.of["value", (layer, "v", group)]
                now.of["z", layer, head] = z
                under = self._tests_head(layer, head)
                wrote = self._linear(("o", layer, head), "o", z, weights[f"{at}.attn.W_O"][head], None, under)
                now.of[Sender("head", layer, head)] = wrote
                stream = stream + wrote
            b_O = weights.get(f"{at}.attn.b_O")
            stream = stream if b_O is None else stream + b_O
            if cfg.d_mlp:
                receiver = Receiver("mlp", layer)
                row = graph.receiver_index[receiver]
                x = norm(read(receiver, before if cfg.parallel else stream), f"{at}.ln2")
                get = weights.get
                hidden = self._linear(("in", layer), "mlp", x, weights[f"{at}.mlp.W_in"], get(f"{at}.mlp.b_in"), row)
                if cfg.gated:
                    gate = self._linear(
                        ("gate", layer), "mlp", x, weights[f"{at}.mlp.W_gate"], get(f"{at}.mlp.b_gate"), row
                    )
                    hidden = oracle.activation(gate, cfg.act) * hidden
                else:
                    hidden = oracle.activation(hidden, cfg.act)
                if cfg.act == "solu_ln":
                    hidden = norm(hidden, f"{at}.mlp.ln", "layer")
                out = self._linear(
                    ("out", layer), "mlp", hidden, weights[f"{at}.mlp.W_out"], get(f"{at}.mlp.b_out"), row
                )
                now.of[Sender("mlp", layer)] = out
                stream = stream + out
        final = norm(read(Receiver("logits", cfg.n_layers), stream), "ln_final")
        b_U, W_U = weights.get("unembed.b_U"), weights["unembed.W_U"]
        now.of["logits"] = self._linear("unembed", "unembed", final, W_U, b_U, False)
        now.of["exact logits"] = final @ W_U + (0 if b_U is None else b_U)
        return now

    def _linear(self, key: Any, kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, under: int | bool) -> Tensor:
        """x @ weight + bias; for a low-precision state from the parent's. under: a receiver's row, or whether FP32."""
        self.now.of["input", key] = x
        if self.parent is None or self.tested is None:
            out = x @ weight if bias is None else x @ weight + bias
        else:
            change = x - self.parent.of["input", key]
            fine = under if isinstance(under, bool) else self._tests(under)
            out = self.parent.of["output", key] + (change @ weight if fine else self.low(kind, change, weight))
        self.now.of["output", key] = out
        return out

    def _tests(self, row: int) -> bool:
        if not self.policy.receiver_under_test or self.tested != row:
            return False
        return self.graph.receivers[row].is_attention or self.policy.others_under_test

    def _tests_head(self, layer: int, head: int) -> bool:
        if not self.policy.receiver_under_test or self.tested is None:
            return False
        receiver = self.graph.receivers[self.tested]
        return receiver.is_attention and receiver.layer == layer and head in self.graph.heads_of(receiver)

    def _gap(self, column: int, low: bool) -> Tensor:
        """What a removed edge takes away."""
        sender = self.graph.senders[column]
        gap = self.clean_run.senders[sender] - self.reference.senders[sender]
        if not low or sender.kind != "head" or self.policy.sender_under_test:
            return gap
        weight = self.model.weights[f"blocks.{sender.layer}.attn.W_O"][sender.index]
        return self.low("o", self.clean.of["z", sender.layer, sender.index] - self._reference_z(sender), weight)

    def _reference_z(self, sender: Sender) -> Tensor:
        """A head's z in the reference run (of the engine's making: an oracle's run keeps only what heads write)."""
        run = reference_run(self.model, self.prompts, self.ablation, self.graph.split_pos)
        return run.z[sender.layer][:, sender.index]

    def low(self, kind: str, change: Tensor, weight: Tensor) -> Tensor:
        """low(change) @ low(weight), summed exactly; floating-point units give BF16."""
        fmt = self.policy.format(kind)
        if fmt.is_exact:
            return change @ weight
        out = round_to(change, fmt).double() @ round_to(weight.T.contiguous(), fmt).T.double()
        return out.float() if fmt.name == "int8" else out.bfloat16().float()
