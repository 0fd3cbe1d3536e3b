"""The engine: metrics of many neighbouring states of a sweep, exactly, at a fraction of a forward pass each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pahq.engine.batch import Batch, BatchPass, Step, plan
from pahq.engine.flops import Flops
from pahq.engine.marks import Marks, Reach, head_column, mlp_column
from pahq.engine.nodes import Nodes
from pahq.engine.reference import reference_run, run
from pahq.engine.spans import Spans, gather
from pahq.engine.state import State, projections
from pahq.engine.vocabulary import Vocabulary
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.model.transformer import Transformer
from pahq.task.metrics import get_metric
from pahq.task.prompts import Prompts

MEMORY_LIMIT = 2 << 30
"""Bytes that the values of one batch of states may take by default."""


class Engine:
    """Holds one base state (a set of present edges) and evaluates states that differ from it by a few edges.

    The base starts as the full model. ``evaluate`` gives the metric of each state of a batch,
    ``commit`` makes one of them the base, ``rebase`` computes the base afresh from a mask.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Prompts,
        graph: Graph,
        metric: str = "kl_div",
        ablation: str = "resample",
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        if prompts.pad is not None and not model.config.causal and bool(prompts.pad.any()):
            raise PahqError("prompts: padding needs causal attention; give a bidirectional model prompts of one length")
        self.model, self.prompts, self.graph, self.memory_limit = model, prompts, graph, memory_limit
        self.flops = Flops()
        clean = run(model, prompts.clean, graph.split_pos)
        reference = reference_run(model, prompts, ablation, graph.split_pos)
        self.spans = Spans.of(prompts, model.config, ablation, graph.split_pos)
        self.nodes = Nodes(model, self.spans, self.flops)
        self.state = State(graph, clean, reference, self.spans, self.nodes)
        clean_logits = model.unembed(gather(clean.final, prompts.read))
        self.vocabulary = Vocabulary(model, torch.logsumexp(clean_logits, -1), self.flops)
        self.metric = get_metric(metric, prompts, clean_logits)
        self._rows: BatchPass | None = None
        self._metrics = np.empty(0)
        self.base_metric = float(self._measure(gather(clean.final, prompts.read)[None])[0])

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> np.ndarray:
        """The metric of each state: float64 [n], n <= batch.n_states where memory does not reach for all of them.

        Raises PahqError if a metric is NaN or infinite.
        """
        steps = plan(self.graph, batch)
        fits = max(1, int(batch.n_states * self.memory_limit / max(1, self._bytes(steps, batch))))
        if fits < batch.n_states:
            batch = batch.first(fits)
            steps = plan(self.graph, batch)
        self._rows = BatchPass(self.state, self.nodes, batch)
        result = self._rows.run(steps)
        metrics = np.full(batch.n_states, self.base_metric)
        if result is not None:
            first, final = result
            metrics[first:] = self._measure(final)
        bad = np.flatnonzero(~np.isfinite(metrics))
        if len(bad):
            row, column = batch.candidates[int(bad[0])]
            raise PahqError(
                f"metric '{self.metric.name}' became {metrics[bad[0]]} when edge {self.graph.edge_name(row, column)} "
                "was removed; check the model's weights, or use float32 or float64"
            )
        self._metrics = metrics
        return metrics

    def commit(self, state: int) -> None:
        """Makes a state of the last evaluated batch the base."""
        assert self._rows is not None
        for key, (first, values) in self._rows.rows.items():
            if state >= first:
                self.state.changed[key] = values[state - first].clone()
        self.base_metric = float(self._metrics[state])
        self._rows = None

    @torch.no_grad()
    def rebase(self, marks: Marks) -> None:
        """The base of ``marks``, computed afresh: a function of the mask alone, free of earlier rounding."""
        self.state.changed.clear()
        self._rows = None
        final = self.state.input(len(self.graph.receivers) - 1, Reach.READ)
        touched: set[tuple[int, int]] = set()  # heads whose q, k or v were set, ended by layer
        layer = -1
        for row, receiver in enumerate(self.graph.receivers):
            if not marks.finished[row] and not marks.direct_cut(row):
                continue  # untouched so far: as in the clean run
            if receiver.layer != layer or not receiver.is_attention:
                self._rebase_heads(touched, marks)
                touched, layer = set(), receiver.layer
            level = Reach.READ if receiver.kind == "logits" else marks.consumers_reach(receiver)
            if not level:
                continue
            if receiver.is_attention:
                touched |= self._rebase_attention(row, marks, level)
                continue
            x = self.state.patched_input(row, marks, level)
            self.state.changed["x", row, 0] = x
            if receiver.kind == "logits":
                final = x
            else:
                out = self.nodes.mlp(x[None], receiver.layer)[0]
                self.state.changed["out", mlp_column(self.graph, receiver.layer), 0] = out
        self.base_metric = float(self._measure(self.spans.at_read(final)[None])[0])

    def _rebase_attention(self, row: int, marks: Marks, level: Reach) -> set[tuple[int, int]]:
        """Queries, keys or values of one receiver afresh; -> the heads (layer, head) that use them."""
        receiver, touched = self.graph.receivers[row], set()
        x = None
        if not marks.direct_cut(row):
            x = self.state.changed["x", row, 0] = self.state.patched_input(row, marks, level)
        for which, index in projections(self.graph, receiver):
            reach = level
            if which == "q":
                reach = Reach(int(marks.reach[head_column(self.graph, receiver.layer, index)]))
            if not reach:
                continue
            if x is None:
                base = self.state.projected(which, receiver.layer, index, reach)
                value = self.state.fallback(which, receiver.layer, index, reach).expand_as(base)
            else:
                narrowed = self.spans.narrow(x, level, reach)
                value = self.nodes.project(narrowed[None], which, receiver.layer, index, reach)[0]
            self.state.changed[which, receiver.layer, index] = value
        for head in self.graph.heads_of(receiver):
            touched.add((receiver.layer, head))
        return touched

    def _rebase_heads(self, heads: set[tuple[int, int]], marks: Marks) -> None:
        size = self.graph.config.group_size
        for layer, head in sorted(heads):
            column = head_column(self.graph, layer, head)
            level = Reach(int(marks.reach[column]))
            if not level:
                continue
            group = head // size
            q = self.state.projected("q", layer, head, level)[None]
            k, v = (self.state.projected(which, layer, group, Reach.ALL)[None] for which in "kv")
            prefix = [self.state.clean_prefix(which, layer, group) for which in "kv"]
            self.state.changed["out", column, 0] = self.nodes.head(q, k, v, level, *prefix)[0]

    def _measure(self, final: Tensor) -> np.ndarray:
        """final [S, B, P, d] at the read positions -> the metric of each state, float64 [S]."""
        return self.metric(self.vocabulary.read(final)).cpu().numpy()

    def _bytes(self, steps: list[Step], batch: Batch) -> int:
        """Memory that the values of a batch take: inputs and outputs of what changes, and a working copy."""
        tokens = sum((batch.n_states - step.first) * self.spans.count(step.level) for step in steps)
        return 3 * tokens * len(self.prompts) * self.model.config.d_model * self.state.clean.final.element_size()
