"""The model cut down to a circuit, by one whole forward pass: the plain way that published ACDC takes for every edge.

Used to evaluate finished circuits on any prompts, and as the baseline of benchmarks. All receivers of
one kind and layer are computed together; nothing else is saved.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pahq.engine.reference import Run, reference_run
from pahq.errors import PahqError
from pahq.graph import Graph, Receiver, Sender
from pahq.graph.nodes import ReceiverKind
from pahq.model.transformer import Transformer
from pahq.task.prompts import Prompts

CHUNK_BYTES = 256 * 2**20
"""Bound on the sender values held at a time; longer sets of prompts are evaluated piece by piece."""


def patched_logits(
    model: Transformer,
    prompts: Prompts,
    graph: Graph,
    mask: np.ndarray,
    ablation: str = "resample",
    visited: np.ndarray | None = None,
    reference: Run | None = None,
) -> Tensor:
    """Logits [N, P, V] at ``prompts.read`` of the model whose only edges are those of ``mask``.

    mask: bool [n_receivers, n_senders + 1]. visited: bool [n_receivers], the receivers whose input is
    reference + sum over present edges of (sender now - sender in the reference run); the others read the
    ordinary residual stream (all are visited by default). reference: the run of ``reference_run`` for
    these very prompts, where many masks are evaluated on them; then the prompts are one piece.
    Raises PahqError for a mask of another shape or an unknown ablation.
    """
    if mask.shape != graph.shape:
        raise PahqError(
            f"mask: its shape {list(mask.shape)} does not fit the {list(graph.shape)} receivers and senders of "
            f"{graph.config.name}; take the mask of a circuit of this model with the same graph options"
        )
    if visited is None:
        visited = np.ones(len(graph.receivers), dtype=bool)
    if reference is not None:
        return _Pass(model, graph, mask, visited, reference).logits(prompts)
    shared = reference_run(model, prompts, ablation, graph.split_pos) if ablation == "mean" else None
    values = (len(graph.senders) + 4 * model.config.n_heads) * prompts.clean.shape[1] * model.config.d_model
    step = max(1, CHUNK_BYTES // (values * model.dtype.itemsize))
    out = []
    for start in range(0, len(prompts), step):
        piece = prompts[start : start + step]
        run = reference_run(model, piece, ablation, graph.split_pos) if shared is None else shared
        out.append(_Pass(model, graph, mask, visited, run).logits(piece))
    return torch.cat(out)


class _Pass:
    """One patched forward pass. ``delta`` [senders, N, T, d]: each sender's value now - in the reference run."""

    def __init__(self, model: Transformer, graph: Graph, mask: np.ndarray, visited: np.ndarray, ref: Run) -> None:
        self.model, self.graph, self.mask, self.visited, self.ref = model, graph, mask, visited, ref

    @torch.no_grad()
    def logits(self, prompts: Prompts) -> Tensor:
        model, graph, ref, cfg = self.model, self.graph, self.ref, self.model.config
        tokens = prompts.clean
        where = torch.arange(tokens.shape[1], device=model.device)
        self.delta = torch.zeros(len(graph.senders), *tokens.shape, cfg.d_model, dtype=model.dtype, device=model.device)
        embed, pos = model.embed(tokens)
        if pos is None:
            x, parts = embed, [embed]
        else:
            x = embed + pos
            parts = [embed, pos[None]] if graph.split_pos else [x]
        for column, value in enumerate(parts):
            self.delta[column] = value - ref.sender(graph.senders[column])
        for layer, block in enumerate(model.blocks):
            q, k, v = (self._computed(x, layer, which, where) for which in "qkv")
            z = model.attend(q, k, v)
            heads = slice(self._column("head", layer), self._column("head", layer) + cfg.n_heads)
            torch.matmul((z - ref.z[layer]).transpose(0, 1), block.attn.W_O[:, None], out=self.delta[heads])
            middle = x + torch.einsum("nhtc,hcd->ntd", z, block.attn.W_O)
            middle = middle if block.attn.b_O is None else middle + block.attn.b_O
            if block.mlp is not None and block.ln2 is not None:
                row = graph.receiver_index[Receiver("mlp", layer)]
                read = self._inputs([row], x if cfg.parallel else middle, ref.mlp_in[layer])[0]
                out = block.mlp(block.ln2(read))
                self.delta[self._column("mlp", layer)] = out - ref.mlp[layer]
                middle = middle + out
            x = middle
        final = self._inputs([graph.receiver_index[Receiver("logits", cfg.n_layers)]], x, ref.final)[0]
        return model.unembed(final[torch.arange(len(prompts), device=model.device)[:, None], prompts.read])

    def _column(self, kind: str, layer: int) -> int:
        """Column of the layer's MLP, or of its first head."""
        return self.graph.sender_index[Sender("head" if kind == "head" else "mlp", layer)]

    def _inputs(self, rows: list[int], stream: Tensor, reference: Tensor) -> Tensor:
        """What the receivers ``rows`` (of one kind and layer) read: [rows, N, T, d]."""
        upstream = self.graph.n_upstream(self.graph.receivers[rows[0]])
        present = torch.from_numpy(self.mask[rows, :upstream]).to(stream)
        change = (present @ self.delta[:upstream].flatten(1)).view(-1, *stream.shape)
        visited = torch.from_numpy(self.visited[rows]).to(stream.device)
        return torch.where(visited[:, None, None, None], reference + change, stream)

    def _computed(self, stream: Tensor, layer: int, which: str, where: Tensor) -> Tensor:
        """q of all heads, or k or v of all groups, before the rotary turn: [N, heads, T, dh]."""
        graph, cfg, attn = self.graph, self.model.config, self.model.blocks[layer].attn
        kind: ReceiverKind = "qkv" if not graph.split_qkv else "q" if which == "q" else "k" if which == "k" else "v"
        count = cfg.n_heads if kind == "q" else cfg.n_kv_heads
        rows = [graph.receiver_index[Receiver(kind, layer, index)] for index in range(count)]
        x = self.model.attn_input(self._inputs(rows, stream, self.ref.attn_in[layer]), layer, which, where)
        cut = self.mask[rows, graph.direct] < graph.edges[rows, graph.direct]
        if which == "q" and kind == "qkv":  # a group's input feeds all its heads
            x, cut = x.repeat_interleave(cfg.group_size, dim=0), cut.repeat(cfg.group_size)
        weight = {"q": attn.W_Q, "k": attn.W_K, "v": attn.W_V}[which]
        bias = {"q": attn.b_Q, "k": attn.b_K, "v": attn.b_V}[which]
        out = torch.einsum("hntd,hdc->nhtc", x, weight)
        out = out if bias is None else out + bias[:, None]
        norm = {"q": attn.q_norm, "k": attn.k_norm, "v": None}[which]
        out = out if norm is None else norm(out)
        fallback = {"q": self.ref.q, "k": self.ref.k, "v": self.ref.v}[which][layer]
        return torch.where(torch.from_numpy(cut).to(out.device)[:, None, None], fallback, out)
