"""The model cut down to a circuit, by one whole forward pass: the plain way that published ACDC takes for every edge.

Used to evaluate finished circuits on any prompts, and as the baseline of benchmarks. All receivers of
one kind and layer are computed together; nothing else is saved.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pahq.engine.reference import Run, reference_run, run
from pahq.errors import PahqError
from pahq.graph import Graph, Receiver, Sender
from pahq.graph.nodes import ReceiverKind
from pahq.model.transformer import Transformer
from pahq.task.prompts import Prompts, check_padding

CHUNK_BYTES = 256 * 2**20
"""Bound on the sender values held at a time; longer sets of prompts are evaluated piece by piece."""


def patched_logits(
    model: Transformer,
    prompts: Prompts,
    graph: Graph,
    mask: np.ndarray,
    ablation: str = "resample",
    visited: np.ndarray | None = None,
) -> Tensor:
    """Logits [N, P, V] at ``prompts.read`` of the model whose only edges are those of ``mask``.

    mask: bool [n_receivers, n_senders + 1]. visited: bool [n_receivers], the receivers whose input is
    reference + sum over present edges of (sender now - sender in the reference run); the others read the
    ordinary residual stream (all are visited by default).
    Under mean ablation the means are taken over the corrupted prompts at hand, not over those that a circuit was
    found on: with other prompts, or fewer, the same example can have other logits.
    Raises PahqError for a mask of another shape, an unknown ablation, or padding that the model would attend to.
    """
    if mask.shape != graph.shape:
        raise PahqError(
            f"mask: its shape {list(mask.shape)} does not fit the {list(graph.shape)} receivers and senders of "
            f"{graph.config.name}; take the mask of a circuit of this model with the same graph options"
        )
    shared = reference_run(model, prompts, ablation, graph.split_pos) if ablation == "mean" else None
    values = (len(graph.senders) + 4 * model.config.n_heads) * prompts.clean.shape[1] * model.config.d_model
    step = max(1, CHUNK_BYTES // (values * model.dtype.itemsize))
    out = []
    for start in range(0, len(prompts), step):
        piece = prompts[start : start + step]
        out.append(FullEvaluator(model, piece, graph, ablation, shared).logits(mask, visited))
    return torch.cat(out)


class FullEvaluator:
    """Patched forward passes over one set of prompts, as many as wanted.

    reference: the run of ``reference_run`` for these prompts, made here if not given.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Prompts,
        graph: Graph,
        ablation: str = "resample",
        reference: Run | None = None,
    ) -> None:
        check_padding(prompts, model.config)
        self.model, self.prompts, self.graph = model, prompts, graph
        self.ref = reference_run(model, prompts, ablation, graph.split_pos) if reference is None else reference
        # delta [senders, N, T, d]: each sender's value now - in the reference run
        shape = (len(graph.senders), *prompts.clean.shape, model.config.d_model)
        self.delta = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self._clean: Run | None = None
        self._altered_from = 0  # senders of layers below still have their clean differences

    @torch.no_grad()
    def logits(self, mask: np.ndarray, visited: np.ndarray | None = None, from_layer: int = 0) -> Tensor:
        """Logits [N, P, V] at the positions read; mask and visited as for ``patched_logits``.

        from_layer: layers below are taken from the clean run (none of their receivers may be visited).
        """
        model, graph, ref, prompts = self.model, self.graph, self.ref, self.prompts
        self.mask = mask
        self.visited = np.ones(len(graph.receivers), dtype=bool) if visited is None else visited
        where = torch.arange(prompts.clean.shape[1], device=model.device)
        x = self._resume(from_layer) if from_layer else self._start()
        self._altered_from = from_layer
        for layer in range(from_layer, model.config.n_layers):
            x = self._layer(x, layer, where)
        final = self._inputs([graph.receiver_index[Receiver("logits", model.config.n_layers)]], x, ref.final)[0]
        self._keep("final", final)
        return model.unembed(final[torch.arange(len(prompts), device=model.device)[:, None], prompts.read])

    def _start(self) -> Tensor:
        """The embeddings: [N, T, d]."""
        graph, ref = self.graph, self.ref
        embed, pos = self.model.embed(self.prompts.clean)
        if pos is None:
            x, parts = embed, [embed]
        else:
            x = embed + pos
            parts = [embed, pos[None]] if graph.split_pos else [x]
        for column, value in enumerate(parts):
            self.delta[column] = value - ref.sender(graph.senders[column])
        return x

    def _resume(self, layer: int) -> Tensor:
        """The clean run's residual stream before a layer [N, T, d]; all senders below are as in the clean run."""
        graph, ref = self.graph, self.ref
        if self._clean is None:
            self._clean = run(self.model, self.prompts.clean, graph.split_pos)
        for column, sender in enumerate(graph.senders):
            if self._altered_from <= sender.layer < layer or (sender.layer < 0 and self._altered_from <= 0):
                gap = self._clean.sender(sender) - ref.sender(sender)
                is_head = sender.kind == "head"
                self.delta[column] = gap @ self.model.blocks[sender.layer].attn.W_O[sender.index] if is_head else gap
        return self._clean.final if layer == self.model.config.n_layers else self._clean.attn_in[layer]

    def _layer(self, x: Tensor, layer: int, where: Tensor) -> Tensor:
        """The residual stream before a layer [N, T, d] -> after it."""
        graph, ref, cfg, block = self.graph, self.ref, self.model.config, self.model.blocks[layer]
        q, k, v = (self._computed(x, layer, which, where) for which in "qkv")
        z = self.model.attend(q, k, v)
        for name, value in (("q", q), ("k", k), ("v", v), ("z", z)):
            self._keep(name, value)
        heads = slice(self._column("head", layer), self._column("head", layer) + cfg.n_heads)
        torch.matmul((z - ref.z[layer]).transpose(0, 1), block.attn.W_O[:, None], out=self.delta[heads])
        middle = x + torch.einsum("nhtc,hcd->ntd", z, block.attn.W_O)
        middle = middle if block.attn.b_O is None else middle + block.attn.b_O
        if block.mlp is not None and block.ln2 is not None:
            row = graph.receiver_index[Receiver("mlp", layer)]
            read = self._inputs([row], x if cfg.parallel else middle, ref.mlp_in[layer])[0]
            out = block.mlp(block.ln2(read))
            self._keep("mlp", out)
            self.delta[self._column("mlp", layer)] = out - ref.mlp[layer]
            middle = middle + out
        return middle

    def _keep(self, name: str, value: Tensor) -> None:
        """Told what every layer computes, for whoever needs more than logits."""

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
        out = attn.project_each(x, which)
        fallback = {"q": self.ref.q, "k": self.ref.k, "v": self.ref.v}[which][layer]
        return torch.where(torch.from_numpy(cut).to(out.device)[:, None, None], fallback, out)
