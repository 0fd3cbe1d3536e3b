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
from pahq.engine.screen import Screen, worth_screening
from pahq.engine.spans import Spans, gather
from pahq.engine.state import Key, State, projections
from pahq.engine.vocabulary import Vocabulary, VocabularyReadout
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.model.transformer import Transformer
from pahq.task.metrics import get_metric
from pahq.task.prompts import Prompts, check_padding

LAUNCH_FLOPS = {"cpu": 1.5e8, "gpu": 5e10}
"""FLOPs a device could do (a CPU with one thread) in the time that issuing one batch's operations takes: a few ms."""
ENOUGH_STATES, MOST = 64, 0.7
"""Once so many states were screened, this share of them evaluated in full as well ends the screening."""
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
        screen: bool | None = None,
        tolerance: float = 0.0,
    ) -> None:
        """screen: sum over likely tokens where that will do (see ``screen.Screen``); None: for large vocabularies.

        tolerance: how much slack the base state's own metric may have.
        """
        check_padding(prompts, model.config)
        self.model, self.prompts, self.graph, self.memory_limit = model, prompts, graph, memory_limit
        self.flops = Flops()
        clean = run(model, prompts.clean, graph.split_pos)
        reference = reference_run(model, prompts, ablation, graph.split_pos)
        self.spans = Spans.of(prompts, model.config, ablation, graph.split_pos)
        self.nodes = Nodes(model, self.spans, self.flops)
        self.state = State(graph, clean, reference, self.spans, self.nodes)
        clean_logits = model.unembed(gather(clean.final, prompts.read))
        self.metric = get_metric(metric, prompts, clean_logits)
        if screen is None:
            screen = self.metric.sums_vocabulary and worth_screening(model, prompts.read.numel())
        self.vocabulary = Vocabulary(
            model,
            torch.logsumexp(clean_logits, -1),
            self.metric.weight,
            self.flops,
            Screen(model, self.flops) if screen else None,
        )
        self.tolerance = tolerance
        self.escalated = 0
        self.screening = self.vocabulary.screen is not None
        self._since_rebase = [0, 0]  # states evaluated, and how many of them in full as well
        self._rows: BatchPass | None = None
        self._final: tuple[int, Tensor] | None = None
        self._read: VocabularyReadout | None = None
        self._metrics = self._slack = np.empty(0)
        self._set_base(gather(clean.final, prompts.read), select=True)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The metric of each state and its slack: float64 [n], n <= batch.n_states if memory does not reach for all.

        A slack above 0 says how far the metric may be off; ``sharpen`` removes it.

        Raises PahqError if a metric is NaN or infinite.
        """
        steps = plan(self.graph, batch)
        fits = max(1, int(batch.n_states * self.memory_limit / max(1, self._bytes(steps, batch))))
        if fits < batch.n_states:
            batch = batch.first(fits)
            steps = plan(self.graph, batch)
        self._batch, self._rows = batch, BatchPass(self.state, self.nodes, batch)
        self._final = self._rows.run(steps)
        self._metrics = np.full(batch.n_states, self.base_metric)
        self._slack = np.full(batch.n_states, self.base_slack)
        self._read = None
        if self._final is not None:
            first, final = self._final
            self._read = self.vocabulary.read(final, full=not self.screening)
            self._since_rebase[0] += batch.n_states - first
            self._metrics[first:] = self.metric(self._read).cpu().numpy()
            self._slack[first:] = self._read.slack
        self._check()
        return self._metrics, self._slack

    @torch.no_grad()
    def sharpen(self, states: list[int]) -> None:
        """Evaluates states of the last batch over the full vocabulary, in place in what ``evaluate`` gave.

        A state of -1 is the base.
        """
        if -1 in states and self.base_slack:
            self._set_base(self._base_final, select=False)
            unchanged = self._final[0] if self._final is not None else len(self._metrics)
            self._metrics[:unchanged], self._slack[:unchanged] = self.base_metric, 0.0
        if self._final is None:
            return
        first, final = self._final
        states = [state for state in states if state >= first and self._slack[state]]
        if not states:
            return
        self.escalated += len(states)
        self._since_rebase[1] += len(states)
        rows = torch.tensor([state - first for state in states], device=final.device)
        read = self.vocabulary.read(final[rows], full=True)
        self._metrics[states], self._slack[states] = self.metric(read).cpu().numpy(), 0.0
        for state, total in zip(states, read.logsumexp(), strict=True):
            self._observe(state - first, total)
        self._check()
        # A screen that most states need to pass twice is a loss: do without until the next rebase.
        evaluated, again = self._since_rebase
        self.screening &= evaluated < ENOUGH_STATES or again < MOST * evaluated

    @property
    def batch_overhead(self) -> float:
        """What a batch costs however few its states, in FLOPs: launching its operations, and anchoring the screen."""
        on_cpu = self.model.device.type == "cpu"
        launch = LAUNCH_FLOPS["cpu"] * torch.get_num_threads() if on_cpu else LAUNCH_FLOPS["gpu"]
        return launch + (4 * self.prompts.read.numel() * self.model.W_U.numel() if self.screening else 0)

    def commit(self, state: int) -> None:
        """Makes a state of the last evaluated batch the base."""
        assert self._rows is not None
        changed: dict[Key, Tensor] = {}
        for step in self._rows.steps:
            if state >= step.first and (step.removed or step.senders):
                changed["x", step.row, 0] = self._rows.input(step, state, state + 1)[0]
        for key, (first, values) in self._rows.rows.items():
            if state >= first:
                changed[key] = values[state - first].clone()
        self.state.changed |= changed
        self.base_metric, self.base_slack = float(self._metrics[state]), float(self._slack[state])
        if self._final is not None and state >= self._final[0]:
            self._base_final = self._final[1][state - self._final[0]].clone()
            moved = 0.0 if self._read is None else float(self._read.slack[state - self._final[0]])
            if moved > self.tolerance:  # also where the metric is known in full: the anchor shall follow
                already = not self.base_slack
                total = self._set_base(self._base_final, select=False)
                if not already and total is not None:
                    self._observe(state - self._final[0], total)
        self._rows = self._final = self._read = None

    def _set_base(self, final: Tensor, select: bool) -> Tensor | None:
        """Measures a base state in full from its final residual stream [B, P, d] at the read positions.

        Anchors the screen there, if there is one, and gives the log-sum-exp [B, P] then.
        """
        self._base_final, self.base_slack = final, 0.0
        read = self.vocabulary.read(final[None], full=True)
        total = None
        if self.screening:
            total = self.vocabulary.anchor(read.h[0], select)
            read.know_logsumexp(total[None])
        self.base_metric = float(self.metric(read)[0])
        return total

    def _observe(self, state: int, total: Tensor) -> None:
        """Tells the screen the log-sum-exp [B, P] of a state that it had estimated."""
        if self._read is None or self._read.missed is None or self.vocabulary.screen is None:
            return
        without, estimate = (part[state] for part in self._read.missed)
        mean = self.vocabulary.mean
        self.vocabulary.screen.observe(float(mean(total - without)), float(mean(estimate)))

    def _check(self) -> None:
        """Raises PahqError, naming the edge, where a metric of the batch is NaN or infinite."""
        bad = np.flatnonzero(~np.isfinite(self._metrics))
        if len(bad):
            row, column = self._batch.candidates[int(bad[0])]
            raise PahqError(
                f"metric '{self.metric.name}' became {self._metrics[bad[0]]} when edge "
                f"{self.graph.edge_name(row, column)} was removed; check the model's weights, or use float64"
            )

    @torch.no_grad()
    def rebase(self, marks: Marks) -> None:
        """The base of ``marks``, computed afresh: a function of the mask alone, free of earlier rounding."""
        self.state.changed.clear()
        self._rows = None
        self.screening, self._since_rebase = self.vocabulary.screen is not None, [0, 0]
        final = self.state.input(len(self.graph.receivers) - 1, Reach.READ)
        touched: set[tuple[int, int]] = set()  # heads whose q, k or v were set, ended by layer
        layer = -1
        for row, receiver in enumerate(self.graph.receivers):
            if not marks.finished[row] and not marks.direct_cut(row):
                continue  # untouched so far: as in the clean run
            if receiver.layer != layer or not receiver.is_attention:
                self._rebase_heads(touched, marks)
                touched, layer = set(), receiver.layer
            level = marks.consumers_reach(receiver)
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
        self._set_base(self.spans.at_read(final), select=True)

    def _rebase_attention(self, row: int, marks: Marks, level: Reach) -> set[tuple[int, int]]:
        """Queries, keys or values of one receiver afresh; -> the heads (layer, head) that use them."""
        receiver, touched = self.graph.receivers[row], set()
        x = None
        if not marks.direct_cut(row):
            x = self.state.changed["x", row, 0] = self.state.patched_input(row, marks, level)
        for which, index in projections(self.graph, receiver):
            reach = level
            if which == "q":
                reach = marks.sender_reach(head_column(self.graph, receiver.layer, index))
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
            level = marks.sender_reach(column)
            if not level:
                continue
            group = head // size
            q = self.state.projected("q", layer, head, level)[None]
            k, v = (self.state.projected(which, layer, group, Reach.ALL)[None] for which in "kv")
            prefix = [self.state.clean_prefix(which, layer, group) for which in "kv"]
            self.state.changed["out", column, 0] = self.nodes.head(q, k, v, level, *prefix)[0]

    def _bytes(self, steps: list[Step], batch: Batch) -> int:
        """Memory that the values of a batch take: inputs and outputs of what changes, and a working copy.

        Likewise the attention patterns of one head at a time, and all logits where the metric asks for them.
        """
        cfg, states, examples = self.model.config, batch.n_states, len(self.prompts)
        counts = [(states - step.first) * self.spans.count(step.level) for step in steps]
        elements = sum(counts) * examples * cfg.d_model + max(counts, default=0) * examples * self.spans.stop
        if self.metric.reads_logits:
            elements += states * self.prompts.read.numel() * cfg.d_vocab_out
        return 3 * elements * self.state.clean.final.element_size()
