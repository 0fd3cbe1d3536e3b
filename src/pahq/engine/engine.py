"""The engine: metrics of many neighbouring states of a sweep at a fraction of a forward pass each.

In FP32 they are exact. Under a precision policy that quantises differences the base state stays FP32's own, and
single states can be evaluated again in FP32; one that quantises values computes everything in its arithmetic.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pahq.engine.batch import Batch, BatchPass, Step, plan
from pahq.engine.evaluated import Evaluated, Final, Lag
from pahq.engine.flops import Flops
from pahq.engine.marks import Marks
from pahq.engine.rebase import Rebase
from pahq.engine.setup import Arithmetics, setup
from pahq.engine.spans import gather
from pahq.engine.state import Key
from pahq.engine.vocabulary import ChainBase, Chained, Products, VocabularyReadout
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.model.transformer import Transformer
from pahq.precision.policy import Policy, get_policy
from pahq.precision.schedule import Scheduler
from pahq.task.prompts import Prompts, check_padding

LAUNCH_FLOPS = {"cpu": 1.5e8, "gpu": 5e10}
"""FLOPs a device could do (a CPU with one thread) in the time that issuing one batch's operations takes: a few ms."""
LOW_SPEED = 3
"""How much sooner a FLOP of the states is done in low precision than one in FP32, all that goes with it included."""
ENOUGH_STATES, MOST = 64, 0.7
"""Once so many states were screened, this share of them evaluated in full as well ends the screening."""
MEMORY_LIMIT = 2 << 30
"""Bytes that the values of one batch of states may take by default."""
DRIFT = 64
"""Edges removed from a base in low precision until FP32's values replace its own, if they were not at hand before."""


class Engine:
    """Holds one base state (a set of present edges) and evaluates states that differ from it by a few edges.

    The base starts as the full model (or a circuit). ``evaluate`` gives the metric of each state of a batch,
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
        policy: Policy | str = "fp32",
        scheduler: Scheduler | None = None,
        start: np.ndarray | None = None,
    ) -> None:
        """screen: sum over likely tokens where that will do (see ``screen.Screen``); None: for large vocabularies.

        tolerance: how much slack the base state's own metric may have. policy: see ``precision.policy``.
        scheduler: streams that FP32 weights and low-precision products may use; the caller closes it.
        start: edges of the base to begin with, bool [n_receivers, n_senders + 1], None for all; marks must lie within.
        Raises PahqError for padding the model would attend to, and a policy that the device or type cannot bear.
        """
        check_padding(prompts, model.config)
        self.policy, self.scheduler = get_policy(policy), scheduler
        self.prompts, self.graph, self.memory_limit, self.tolerance = prompts, graph, memory_limit, tolerance
        self.flops = Flops()
        self.parts: Arithmetics = setup(
            model, prompts, graph, metric, ablation, screen, self.policy, self.flops, scheduler, start
        )
        self.model, self.spans, self.state = self.parts.nodes.model, self.parts.nodes.spans, self.parts.state
        self.metric, self.vocabulary, self.store = self.parts.metric, self.parts.vocabulary, self.parts.store
        self.escalated = 0
        """States summed over the full vocabulary after a screened sum."""
        self.exact_states = 0
        """States evaluated in FP32 after (or for lack of) a low-precision evaluation."""
        self.screening = self.vocabulary.screen is not None
        self._since_rebase = [0, 0]  # states evaluated, and how many of them in full as well
        self._now: Evaluated | None = None
        self._chain_base: ChainBase | None = None
        self._lag = Lag(self.state.twin(), gather(self.state.clean.final, prompts.read))
        self._drift = 0  # edges removed since the base's values were FP32's
        self._set_base(self._lag.final, select=True)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The metric of each state and its slack: float64 [n], n <= batch.n_states if memory does not reach for all.

        A slack above 0 says how far the metric may be off; ``sharpen`` removes it. Slack is about the vocabulary
        alone: what low precision adds to it, only ``refine`` can tell.
        Raises PahqError if a metric is NaN or infinite.
        """
        batch, steps = self._fitting(batch)
        self._lag.forget_batch()
        self._now = self._pass(batch, steps, chained=self.policy.differences)
        self._since_rebase[0] += batch.n_states - (batch.n_states if self._now.final is None else self._now.final[0])
        return self._now.metrics, self._now.slack

    @property
    def moved(self) -> np.ndarray:
        """How far each state of the last batch lies from the state it was chained to, in what W_U reads: float64 [n].

        Root of the mean square over the positions read; zeros unless the policy quantises differences.
        """
        assert self._now is not None
        return self._now.moved

    def _fitting(self, batch: Batch) -> tuple[Batch, list[Step]]:
        """As many of the batch's states as memory has room for, and their plan."""
        steps = plan(self.graph, batch)
        fits = max(1, int(batch.n_states * self.memory_limit / max(1, self._bytes(steps, batch))))
        if fits >= batch.n_states:
            return batch, steps
        batch = batch.take(slice(0, fits))
        return batch, plan(self.graph, batch)

    def _pass(self, batch: Batch, steps: list[Step], chained: bool = False) -> Evaluated:
        rows = BatchPass(self.state, self.parts.chains if chained else self.parts.plain, batch)
        final = rows.run(steps)
        count, read, chain = batch.n_states, None, None
        metrics, slack, moved = np.full(count, self.base_metric), np.full(count, self.base_slack), np.zeros(count)
        if final is not None:
            first, values = final
            if chained:
                likely = rows.likely - first if self.screening and rows.likely >= first else None
                chain = Chained(self._base, batch.spine[first:].tolist(), self.store, likely)
            read = self.vocabulary.read(values, not self.screening, chain)
            metrics[first:] = self.metric(read).cpu().numpy()
            slack[first:], moved[first:] = read.slack, read.moved
        self._check(metrics, batch)
        return Evaluated(rows, final, read, metrics, slack, moved)

    @torch.no_grad()
    def sharpen(self, states: list[int]) -> None:
        """Evaluates states of the last batch over the full vocabulary, in place in what ``evaluate`` gave.

        A state of -1 is the base.
        """
        now = self._now
        assert now is not None
        if -1 in states and self.base_slack:
            self._set_base(self._base_final, select=False)
            unchanged = now.final[0] if now.final is not None else len(now.metrics)
            now.metrics[:unchanged], now.slack[:unchanged] = self.base_metric, 0.0
        if now.final is None:
            return
        first, final = now.final
        states = [state for state in states if state >= first and now.slack[state]]
        if not states:
            return
        self.escalated += len(states)
        self._since_rebase[1] += len(states)
        rows = torch.tensor([state - first for state in states], device=final.device)
        read = self.vocabulary.read(final[rows], full=True)
        now.metrics[states], now.slack[states] = self.metric(read).cpu().numpy(), 0.0
        estimated, at = self._estimated(final[rows], now.read, [state - first for state in states])
        for index, total in zip(at, read.logsumexp(), strict=True):
            self._observe(estimated, index, total)
        self._check(now.metrics, now.rows.batch)
        # A screen that most states need to pass twice is a loss: do without until the next rebase.
        evaluated, again = self._since_rebase
        self.screening &= evaluated < ENOUGH_STATES or again < MOST * evaluated

    @torch.no_grad()
    def refine(self, states: list[int], full: bool = True) -> dict[int, tuple[float, float]]:
        """Metric and slack in FP32 of states of the last batch; -1 is the base.

        full: sum over the whole vocabulary, so that there is no slack; otherwise as ``evaluate`` does.
        Only for policies that quantise differences. They leave the FP32 state behind and let it catch up here.
        """
        assert self.policy.differences
        assert self._now is not None
        batch, lag, full = self._now.rows.batch, self._lag, full or not self.screening
        self._catch_up(batch.marks)
        wanted = [state for state in states if state >= 0 and state not in lag.fine]
        while wanted:
            part, _ = self._fitting(batch.take(wanted))
            some, wanted = wanted[: part.n_states], wanted[part.n_states :]
            rows, final = self._exact_pass(part)
            lag.fine |= {state: (rows, final, index) for index, state in enumerate(some)}
        self._measure_exact([state for state in states if (state, full) not in lag.metrics], full)
        return {state: lag.metrics[state, full] for state in states}

    def _catch_up(self, marks: Marks) -> None:
        """Brings the FP32 state to the base. marks: those of the batch at hand."""
        if self._lag.edges:
            behind = Batch(self._lag.edges, np.ones((1, len(self._lag.edges)), dtype=bool), marks)
            self._adopt_exact(*self._exact_pass(behind), 0)

    def _exact_pass(self, batch: Batch) -> tuple[BatchPass, Final]:
        rows = BatchPass(self._lag.state, self.parts.plain, batch)
        self.exact_states += batch.n_states
        return rows, rows.run(plan(self.graph, batch))

    def _measure_exact(self, states: list[int], full: bool) -> None:
        """Reads the metrics of states in FP32 that are not known yet."""
        if not states:
            return
        lag, now = self._lag, self._now
        assert now is not None
        finals = []
        for state in states:
            _, final, index = lag.fine[state] if state >= 0 else (None, None, 0)
            finals.append(lag.final if final is None or index < final[0] else final[1][index - final[0]])
        read = self.vocabulary.read(torch.stack(finals), full=full)
        metrics = self.metric(read).cpu().numpy()
        self._check(metrics, now.rows.batch.take([max(state, 0) for state in states]))
        lag.metrics |= {(state, full): (float(metrics[i]), float(read.slack[i])) for i, state in enumerate(states)}

    @property
    def _base(self) -> ChainBase:
        """Where the logits of chained states start from, made once for each base."""
        if self._chain_base is None or self._chain_base.final is not self._base_final:
            self._chain_base = ChainBase(self._base_final, self.model)
        return self._chain_base

    def _adopt_exact(self, rows: BatchPass, final: Final, state: int) -> None:
        lag = self._lag
        lag.state.update(_changed(rows, state), rows.linear)
        lag.edges, lag.metrics = [], {}
        if final is not None and state >= final[0]:
            lag.final = final[1][state - final[0]].clone()

    @property
    def batch_overhead(self) -> float:
        """What a batch costs however few its states, in FLOPs of its states: launching, and anchoring the screen."""
        on_cpu = self.model.device.type == "cpu"
        launch = LAUNCH_FLOPS["cpu"] * torch.get_num_threads() if on_cpu else LAUNCH_FLOPS["gpu"]
        fixed = launch + (4 * self.prompts.read.numel() * self.model.W_U.numel() if self.screening else 0)
        return fixed * LOW_SPEED if self.policy.differences else fixed

    @torch.no_grad()
    def commit(self, state: int) -> None:
        """Makes a state of the last evaluated batch the base.

        Under a policy that quantises differences its values go on as they are, sums of low-precision products. FP32's
        take their place where the state was evaluated in FP32, and after ``DRIFT`` edges in any case. Under a policy
        that quantises values they are evaluated once more with no head under test.
        """
        now = self._now
        assert now is not None
        batch = now.rows.batch
        if self.policy.differences:
            self._follow(batch, state)
            self._drift += int(batch.applied[state].sum())
            if self._drift >= DRIFT or not self._lag.edges:  # or FP32 is there already
                self._settle(batch.marks)
                return
        if self.policy.values or (self.policy.differences and (state != now.rows.likely or not batch.spine[state])):
            one = batch.take([state])
            one.spine = np.ones(1, dtype=bool)
            if self.policy.values:
                one.tested = np.full(1, -1)
            now, state = self._pass(one, plan(self.graph, one), self.policy.differences), 0
        self._adopt(now, state)
        self._now = None
        self._lag.forget_batch()

    def _settle(self, marks: Marks) -> None:
        """Puts FP32's values in the place of the base's, which drifted from them."""
        self._catch_up(marks)
        self.state.become(self._lag.state)
        self._lag.state.forget_products()  # chains alone need them
        read = self._start_chain(self._lag.final)
        if self.base_slack > self.tolerance:
            self._follow_anchor(read, 0)
        self._now, self._drift = None, 0
        self._lag.forget_batch()

    def _follow(self, batch: Batch, state: int) -> None:
        """Moves the FP32 state along, or notes what it is behind by."""
        fine = self._lag.fine.get(state)
        if fine is not None and not self._lag.edges:
            self._adopt_exact(*fine)
        else:
            self._lag.edges += [batch.candidates[i] for i in np.flatnonzero(batch.applied[state])]

    def _adopt(self, one: Evaluated, state: int) -> None:
        self.state.update(_changed(one.rows, state), one.rows.linear)
        self.base_metric, self.base_slack = float(one.metrics[state]), float(one.slack[state])
        if one.final is None or state < one.final[0]:
            return
        first, final = one.final
        self._base_final = final[state - first].clone()
        read, at = one.read, state - first
        if self.policy.differences:
            screen, carried = self.vocabulary.screen, ()
            if screen is not None and read is not None and state == one.rows.likely:
                carried = read.carried(screen.columns)
            read, at = self._start_chain(self._base_final, carried), 0
        slack = 0.0 if read is None else float(read.slack[at])
        if slack > self.tolerance:  # also where the metric is known in full: the anchor shall follow
            self._follow_anchor(read, at, learns=self.base_slack > 0)

    def _follow_anchor(self, read: VocabularyReadout | None, at: int, learns: bool = True) -> None:
        """Measures the base in full and anchors the screen there, which learns. read, at: where it was screened."""
        estimated, (at,) = self._estimated(self._base_final[None], read, [at])
        total = self._set_base(self._base_final, select=False)
        if learns and total is not None:
            self._observe(estimated, at, total)

    def _start_chain(self, final: Tensor, carried: Products = ()) -> VocabularyReadout:
        """Measures a base state as the states that are chained to it will be, over the likely tokens where that is so.

        final: its residual stream [B, P, d] at the read positions; carried: see ``ChainBase``.
        """
        self._base_final, self._chain_base = final, ChainBase(final, self.model, carried)
        read = self.vocabulary.read_base(self._chain_base, full=not self.screening)
        self.base_metric, self.base_slack = float(self.metric(read)[0]), float(read.slack[0])
        return read

    def _set_base(self, final: Tensor, select: bool) -> Tensor | None:
        """Measures a base state in full from its final residual stream [B, P, d] at the read positions.

        Anchors the screen there, if there is one, and gives the log-sum-exp [B, P] then.
        """
        self._base_final, self.base_slack = final, 0.0
        self._chain_base = None  # what a chain carried here does not belong to a metric measured in FP32
        read = self.vocabulary.read(final[None], full=True)
        total = None
        if self.screening:
            total = self.vocabulary.anchor(read.h[0], select)
            read.know_logsumexp(total[None])
        self.base_metric = float(self.metric(read)[0])
        return total

    def _estimated(
        self, final: Tensor, read: VocabularyReadout | None, at: list[int]
    ) -> tuple[VocabularyReadout | None, list[int]]:
        """Screened sums of states in FP32, from which the screen can learn: a readout, and the states' places in it.

        final: their residual streams [S, B, P, d] at the read positions; read, at: where they were measured. In a chain
        that was in low precision, whose error would look like something the screen misses.
        """
        if read is None or read.missed is None or not self.policy.differences:
            return read, at
        exact = self.vocabulary.read(final)
        exact.logsumexp()
        return exact, list(range(len(final)))

    def _observe(self, read: VocabularyReadout | None, state: int, total: Tensor) -> None:
        """Tells the screen the log-sum-exp [B, P] of a state of a readout that it had estimated."""
        if read is None or read.missed is None or self.vocabulary.screen is None:
            return
        without, estimate = (part[state] for part in read.missed)
        mean = self.vocabulary.mean
        self.vocabulary.screen.observe(float(mean(total - without)), float(mean(estimate)))

    def _check(self, metrics: np.ndarray, batch: Batch) -> None:
        """Raises PahqError, naming the edge, where a metric of the batch is NaN or infinite."""
        bad = np.flatnonzero(~np.isfinite(metrics))
        if len(bad):
            row, column = batch.candidates[int(batch.tested[bad[0]])]
            raise PahqError(
                f"metric '{self.metric.name}' became {metrics[bad[0]]} when edge "
                f"{self.graph.edge_name(row, column)} was removed; {self._mend}"
            )

    @property
    def _mend(self) -> str:
        if "e4m3-overflow" in self.policy.formats.values():
            return "unscaled e4m3 overflows to NaN beyond 448; use e4m3, which is scaled"
        return "check the model's weights, or use float64" if self.policy.is_fp32 else "try --policy fp32"

    @torch.no_grad()
    def rebase(self, marks: Marks) -> None:
        """The base of ``marks``, computed afresh: a function of the mask alone, free of earlier rounding."""
        self._now = None
        self.screening, self._since_rebase = self.vocabulary.screen is not None, [0, 0]
        final = self.spans.at_read(Rebase(self.state, self.parts.plain, marks).run())
        self._set_base(final, select=True)
        self._lag = Lag(self._lag.state, final)
        self._lag.state.become(self.state)
        self._lag.state.forget_products()
        self._drift = 0

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


def _changed(rows: BatchPass, state: int) -> dict[Key, Tensor]:
    """What one state of a pass differs in from its base."""
    changed: dict[Key, Tensor] = {}
    for step in rows.steps:
        if state >= step.first and (step.removed or step.senders):
            known = rows.likely_inputs.get(step.row) if state == rows.likely else None
            changed["x", step.row, 0] = rows.input(step, state, state + 1)[0] if known is None else known
    changed |= {key: rows.value(key, state) for key, (first, _) in rows.rows.items() if state >= first}
    return changed
