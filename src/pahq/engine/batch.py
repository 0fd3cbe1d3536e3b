"""Many neighbouring states of a sweep in one pass, recomputing only what they change.

Row i of a batch is the base state without some of the batch's candidate edges. A node is computed
only in the rows from the first one in which it can differ from the base state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pahq.engine.arithmetic import Arithmetic, pieces
from pahq.engine.marks import Marks, Reach, head_column, mlp_column
from pahq.engine.state import Key, State, projections
from pahq.graph import Graph


@dataclass
class Batch:
    """States to evaluate.

    candidates: (row, column) of the edges that some state removes, in order of testing.
    applied: bool [S, len(candidates)], which of them each state is without.
    marks: the edges present after the whole batch, as far as it was foreseen.
    tested: int [S], the candidate whose removal a state tests. spine: bool [S], whether later states build on it
    (they differ least from the last such state before them). By default state i tests candidate i, off any spine.
    A state that tests -1 tests nothing.
    """

    candidates: list[tuple[int, int]]
    applied: np.ndarray
    marks: Marks
    tested: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    spine: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=bool))

    def __post_init__(self) -> None:
        if not len(self.tested):
            self.tested = np.minimum(np.arange(self.n_states), len(self.candidates) - 1)
        if not len(self.spine):
            self.spine = np.zeros(self.n_states, dtype=bool)

    @property
    def n_states(self) -> int:
        return self.applied.shape[0]

    def take(self, states: slice | list[int]) -> Batch:
        """The batch of some of its states, in order."""
        return Batch(self.candidates, self.applied[states], self.marks, self.tested[states], self.spine[states])

    @property
    def tested_rows(self) -> np.ndarray:
        """int [S]: row of the receiver whose input each state tests, -1 if none."""
        return np.array([*(row for row, _ in self.candidates), -1], dtype=np.int64)[self.tested]


@dataclass
class Step:
    """One receiver that changes: from which state on, through which own candidates and which senders."""

    row: int
    first: int
    level: Reach
    removed: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    senders: list[int] = field(default_factory=list)


def plan(graph: Graph, batch: Batch) -> list[Step]:
    """The receivers that the batch changes, in order of computation.

    Follows present edges from the candidates' receivers towards the logits (spec: only what R reaches).
    """
    n_states = batch.n_states
    marks, mask = batch.marks, batch.marks.mask
    since = np.full(len(graph.senders), n_states)  # first state in which a sender differs
    own: dict[int, list[int]] = {}
    for index, (row, _) in enumerate(batch.candidates):
        own.setdefault(row, []).append(index)
    begins = np.where(batch.applied.any(0), batch.applied.argmax(0), n_states)
    steps: list[Step] = []
    finished = marks.finished
    rows = np.arange(min(own, default=0), len(graph.receivers))
    rows = rows[finished[rows] | np.isin(rows, list(own))]
    position = 0
    while position < len(rows):
        layer = graph.receivers[rows[position]].layer
        changed = since < n_states
        block = [row for row in rows[position:] if graph.receivers[row].layer == layer]
        position += len(block)
        attention = np.array([row for row in block if graph.receivers[row].is_attention], dtype=np.int64)
        others = [row for row in block if not graph.receivers[row].is_attention]
        touched = (mask[attention, : graph.direct] & changed).any(axis=1) | np.isin(attention, list(own))
        for row in attention[touched].tolist():
            _visit(graph, batch, row, own.get(row, []), begins, since, steps)
        for row in others:  # the layer's heads may have changed just now
            if row in own or bool((mask[row, : graph.direct] & (since < n_states)).any()):
                _visit(graph, batch, row, own.get(row, []), begins, since, steps)
    return steps


def _visit(
    graph: Graph, batch: Batch, row: int, own: list[int], begins: np.ndarray, since: np.ndarray, steps: list[Step]
) -> None:
    """Appends the step of a receiver, and notes from when on its node's output differs."""
    receiver, marks, n_states = graph.receivers[row], batch.marks, batch.n_states
    level = marks.consumers_reach(receiver)
    senders = np.flatnonzero(marks.mask[row, : graph.direct] & (since < n_states)).tolist()
    cut = [i for i in own if batch.candidates[i][1] == graph.direct and begins[i] < n_states]
    removed = [i for i in own if batch.candidates[i][1] != graph.direct and begins[i] < n_states]
    first = min([int(begins[i]) for i in (*cut, *removed)] + [int(since[s]) for s in senders], default=n_states)
    if first >= n_states or level == Reach.NOWHERE:
        return
    steps.append(Step(row, first, level, removed, cut, senders))
    if receiver.kind == "mlp":
        column = mlp_column(graph, receiver.layer)
        since[column] = min(since[column], first)
    elif receiver.is_attention:
        for which, index in projections(graph, receiver):
            for head in graph.heads_reading(which, index):
                column = head_column(graph, receiver.layer, head)
                if marks.reach[column]:
                    since[column] = min(since[column], first)


class BatchPass:
    """Carries a plan out. ``rows`` keeps what nodes give: key -> (first state, values [S - first, …]).

    In a chain an MLP's are what it writes beyond the base state, as ``value`` knows.
    Inputs are made, used and dropped a few states at a time, so that they stay in the cache.
    """

    def __init__(self, state: State, maths: Arithmetic, batch: Batch) -> None:
        self.state, self.maths, self.nodes, self.batch = state, maths, maths.nodes, batch
        maths.begin(batch.tested_rows, batch.spine)
        self.linear = maths.linear
        self.graph: Graph = state.graph
        self.rows: dict[Key, tuple[int, Tensor]] = {}
        self.steps: list[Step] = []
        on_spine = np.flatnonzero(batch.spine)
        self.likely = int(on_spine[-1]) if len(on_spine) else batch.n_states - 1
        """The state that becomes the base if all guesses hold, …"""
        self.likely_inputs: dict[int, Tensor] = {}
        """… and its inputs by row."""
        self._written: dict[int, Tensor] = {}
        self._uses: dict[int, int] = {}

    def run(self, steps: list[Step]) -> tuple[int, Tensor] | None:
        """-> (first state, final residual stream at the read positions [S - first, B, P, d]), or None if unchanged."""
        self.steps = steps
        for step in steps:
            for sender in step.senders:
                self._uses[sender] = self._uses.get(sender, 0) + 1
        pending: list[Step] = []
        for step in steps:
            receiver = self.graph.receivers[step.row]
            if pending and (receiver.layer != self.graph.receivers[pending[0].row].layer or not receiver.is_attention):
                self._heads(pending)
                pending = []
            if receiver.kind == "logits":
                final = self.input(step, step.first, self.batch.n_states)
                self._keep_likely(step, final, step.first)
                return step.first, self.state.spans.at_read(final)
            if receiver.is_attention:
                self._attention_receiver(step)
                pending.append(step)
            else:
                walk = self.maths.mlp(step.row, step.first, step.level)
                outputs = [walk(states, x) for states, x in self._inputs(step)]
                self.rows["out", mlp_column(self.graph, receiver.layer), 0] = (step.first, join(outputs))
            self._let_go(step)
        if pending:
            self._heads(pending)
        return None

    def input(self, step: Step, begin: int, end: int) -> Tensor:
        """The receiver's input in the states from ``begin`` to ``end``: [end - begin, B, P, d]."""
        return self._input(step, begin, end, self.state.input(step.row, step.level), step.removed)

    def _input(self, step: Step, begin: int, end: int, start: Tensor, removed: list[int]) -> Tensor:
        """The same from ``start`` [B, P, d], the base's input without the candidates that are not in ``removed``."""
        if not self.maths.residual.is_exact:
            return self._rounded_input(start.expand(end - begin, *start.shape).clone(), step, begin)
        removed = [removed[i] for i in np.flatnonzero(self.batch.applied[begin:end, removed].any(axis=0))]
        senders = [sender for sender in step.senders if self.rows["out", sender, 0][0] < end]
        first = max(begin, self.rows["out", senders[0], 0][0]) if senders else end
        change = self._change(step, senders[0], first, end) if senders and not removed else None
        if change is None:
            x = start.expand(end - begin, *start.shape).clone()
            self._subtract(x, removed, step, begin)
        else:  # one pass over the memory, not a copy and a sum
            x = start.new_empty((end - begin, *start.shape))
            x[: first - begin] = start
            torch.add(start, change, out=x[first - begin :])
            senders = senders[1:]
        for sender in senders:
            first = max(begin, self.rows["out", sender, 0][0])
            self._add_change(x[first - begin :], step, sender, first, end)
        return x

    def _rounded_input(self, x: Tensor, step: Step, begin: int) -> Tensor:
        """``input`` with every sum rounded, in the order of the tests, then of the senders. x: the base's copies."""
        sums = self.nodes.model.add
        applied = self.batch.applied[begin : begin + len(x)]
        for i in sorted(step.removed):
            states = np.flatnonzero(applied[:, i])
            if len(states):
                gap = self.state.differences.one(self.batch.candidates[i][1], step.level)
                some = torch.from_numpy(states).to(x.device)
                x[some] = sums(x[some], -gap)
        for sender in step.senders:
            first = max(begin, self.rows["out", sender, 0][0])
            if first < begin + len(x):
                change = torch.zeros_like(x[first - begin :])
                self._add_change(change, step, sender, first, begin + len(x))
                x[first - begin :] = sums(x[first - begin :], change)
        return x

    def _subtract(self, x: Tensor, removed: list[int], step: Step, begin: int) -> None:
        """Takes from x [s, B, P, d] what the states from ``begin`` on lack of the step's candidates."""
        if removed:
            columns = [self.batch.candidates[i][1] for i in removed]
            applied = torch.from_numpy(self.batch.applied[begin : begin + len(x)][:, removed]).to(x, non_blocking=True)
            rough = self.state.rough if self.maths.chained else None  # the FP32 state must stay FP32's own
            (rough or self.state.differences).subtract(x, applied, columns, step.level)

    def _inputs(self, step: Step) -> Iterator[tuple[slice, Tensor]]:
        """The receiver's inputs, some states at a time: (states counted from ``step.first``, inputs)."""
        start, removed = self.state.input(step.row, step.level), step.removed
        for states in pieces(step.first, self.batch.n_states, start):
            begin, end = states.start, states.stop
            if self.maths.residual.is_exact:  # what all states from here on lack is taken away once
                common = [removed[i] for i in np.flatnonzero(self.batch.applied[begin:, removed].all(axis=0))]
                if common:
                    removed = [i for i in removed if i not in common]
                    start = start[None].clone()
                    self._subtract(start, common, step, begin)
                    start = start[0]
            x = self._input(step, begin, end, start, removed)
            self._keep_likely(step, x, begin)
            yield slice(begin - step.first, end - step.first), x

    def value(self, key: Key, state: int) -> Tensor:
        """What a node of ``rows`` gives in one state."""
        first, values = self.rows[key]
        what, column, _ = key
        if what == "out" and self.maths.chained and self.graph.senders[column].kind == "mlp":
            return values[state - first] + self.state.output(column, self.batch.marks.sender_reach(column))
        return values[state - first].clone()

    def _keep_likely(self, step: Step, x: Tensor, begin: int) -> None:
        if begin <= self.likely < begin + len(x):
            self.likely_inputs[step.row] = x[self.likely - begin].clone()

    def _add_change(self, x: Tensor, step: Step, column: int, begin: int, end: int) -> None:
        """Adds to x [end - begin, B, P, d] what a sender writes beyond the base state."""
        change = self._change(step, column, begin, end)
        if change is not None:
            x += change
            return
        sender, level = self.graph.senders[column], self.batch.marks.sender_reach(column)
        first, values = self.rows["out", column, 0]
        gap = values[begin - first : end - first] - self.state.output(column, level)
        gap = self.state.spans.narrow(gap, level, step.level)
        self.nodes.write_into(x, gap, sender.layer, sender.index)

    def _change(self, step: Step, column: int, begin: int, end: int) -> Tensor | None:
        """What a sender writes beyond the base state [end - begin, B, P, d], or None: a head's that one step reads."""
        sender, level = self.graph.senders[column], self.batch.marks.sender_reach(column)
        first, values = self.rows["out", column, 0]
        if sender.kind == "head":
            # several readers, or states that build on each other: what a head writes is made once
            whole = self.maths.chained or self.maths.rounds
            if not whole and column not in self._written and self._uses[column] <= 1:  # 0: after the run
                return None
            if column not in self._written:
                base = self.state.output(column, level)
                self._written[column] = self.maths.written(sender.layer, sender.index, first, values, base)
            values = self._written[column]
        change = values[begin - first : end - first]
        if sender.kind != "head" and not self.maths.chained:
            change = change - self.state.output(column, level)
        return self.state.spans.narrow(change, level, step.level)

    def _let_go(self, step: Step) -> None:
        """Drops what the step's senders write where it was the last to read it."""
        for sender in step.senders:
            self._uses[sender] -= 1
            if not self._uses[sender]:
                self._written.pop(sender, None)

    def _attention_receiver(self, step: Step) -> None:
        """q, k or v of one receiver in the states that change it."""
        receiver = self.graph.receivers[step.row]
        wanted = []
        for which, index in projections(self.graph, receiver):
            level = step.level if which != "q" else self._reach(receiver.layer, index)
            if level:  # else a dead head that shares a joint receiver
                wanted.append((which, index, level))
        values: dict[tuple[str, int], list[Tensor]] = {(which, index): [] for which, index, _ in wanted}
        if step.removed or step.senders:
            walks = {
                (which, index): self.maths.projection(step.row, step.first, which, index, (step.level, level))
                for which, index, level in wanted
            }
            for states, x in self._inputs(step):
                for key, walk in walks.items():
                    values[key].append(walk(states, x))
        for which, index, level in wanted:
            if values[which, index]:
                value = join(values[which, index])
            else:
                base = self.state.projected(which, receiver.layer, index, level)
                value = base.expand(self.batch.n_states - step.first, *base.shape).clone()
            for i in step.cut:
                states = torch.from_numpy(self.batch.applied[step.first :, i].copy()).to(value.device)
                value[states] = self.state.fallback(which, receiver.layer, index, level)
            self.rows[which, receiver.layer, index] = (step.first, value)

    def _reach(self, layer: int, head: int) -> Reach:
        return self.batch.marks.sender_reach(head_column(self.graph, layer, head))

    def _heads(self, steps: list[Step]) -> None:
        """The outputs of all heads of one layer whose query, key or value changed."""
        layer = self.graph.receivers[steps[0].row].layer
        heads = {
            head
            for step in steps
            for which, index in projections(self.graph, self.graph.receivers[step.row])
            for head in self.graph.heads_reading(which, index)
        }
        size = self.graph.config.group_size
        for head in sorted(heads):
            level = self._reach(layer, head)
            if not level:
                continue
            group = head // size
            parts = {"q": head, "k": group, "v": group}
            first = min(self.rows[w, layer, i][0] for w, i in parts.items() if (w, layer, i) in self.rows)
            q, k, v = (self._states(which, layer, index, level, first) for which, index in parts.items())
            prefix = [self.state.clean_prefix(which, layer, group) for which in "kv"]
            self.rows["out", head_column(self.graph, layer, head), 0] = (
                first,
                self.nodes.head(q, k, v, level, *prefix),
            )

    def _states(self, which: str, layer: int, index: int, level: Reach, first: int) -> Tensor:
        """q, k or v in the states from ``first`` on [S', B, P, dh]; a leading 1 where all share the base value."""
        level = level if which == "q" else Reach.ALL
        base = self.state.projected(which, layer, index, level)
        if (which, layer, index) not in self.rows:
            return base[None]
        begin, value = self.rows[which, layer, index]
        if begin == first:
            return value
        return torch.cat((base.expand(begin - first, *base.shape), value))


def join(parts: list[Tensor]) -> Tensor:
    """Consecutive states [s_i, …] -> all of them [S, …], without a copy where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
