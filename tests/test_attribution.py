"""EAP and EAP-IG against recorded scores, exact effects where theory has them equal, and their slow twins."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import golden
from pahq.errors import PahqError
from pahq.graph import Graph, Receiver, Sender
from pahq.method.attribution import is_flat
from pahq.method.base import Problem, Scores
from pahq.method.eap import EapOptions, eap_scores
from pahq.method.eap_ig import EapIgOptions, eap_ig_scores
from pahq.method.exact import exact_scores
from pahq.model.config import ModelConfig
from pahq.model.transformer import Transformer, build
from pahq.precision.policy import FP32, get_policy
from pahq.task.prompts import Prompts, last_position
from random_models import Case, cases, drawn, random_weights
from tiny import RandomTask, transformer

SLOPED, FLAT = ("logit_diff", "docstring", "greaterthan", "nll"), ("kl_div", "match_nll", "l2")


def problem_of(case: Case, **more: Any) -> Problem:
    return Problem(case.model, case.prompts, case.graph, case.metric, case.ablation, **more)


def pairs(n: int, length: int, vocab: int, seed: int = 0) -> Prompts:
    draw = torch.Generator().manual_seed(seed)
    clean, corrupt = (torch.randint(vocab, (n, length), generator=draw) for _ in range(2))
    right = torch.randint(vocab, (n,), generator=draw)
    return last_position(clean, corrupt, right[:, None].tolist(), ((right + 1) % vocab)[:, None].tolist())


def small_config(**more: Any) -> ModelConfig:
    given: dict[str, Any] = {
        "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "d_model": 8, "d_head": 4, "d_mlp": 9, "d_vocab": 11,
        "d_vocab_out": 11, "n_ctx": 6, "norm": "none", "act": "gelu",
    }  # fmt: skip
    return ModelConfig(**given | more)


scored = [name for name in golden.case_names() if (golden.folder() / name / "eap.json").exists()]

# --- recorded scores ----------------------------------------------------------------------------------------


def recorded(name: str) -> tuple[golden.Case, Prompts, np.ndarray]:
    """A golden case, its prompts with answers, and the recorded scores, NaN where none is."""
    case = golden.load(name)
    facts = json.loads((golden.folder() / name / "eap.json").read_text())
    answers, wrong = (torch.tensor(facts[key])[:, None, None] for key in ("answers", "wrong"))
    scores = np.full(case.graph.shape, np.nan)
    for edge, score in facts["scores"].items():
        scores[case.graph.edge(_our_name(edge))] = score
    return case, dataclasses.replace(case.prompts, answers=answers, wrong=wrong), scores


def _our_name(edge: str) -> str:
    """``A0.1->A1.2.K``, ``Resid Start->MLP 0``, ``MLP 1->Resid End`` as ours."""

    def node(name: str) -> str:
        fixed = {"Resid Start": "embed", "Resid End": "logits"}
        return fixed.get(name) or name.lower().replace("mlp ", "m")

    return "->".join(node(part) for part in edge.split("->"))


@pytest.mark.parametrize("name", scored)
def test_recorded_scores_come_out(name: str) -> None:
    case, prompts, expected = recorded(name)
    known = ~np.isnan(expected)
    addition = case.graph.edges.copy()
    addition[:, case.graph.direct] = False
    assert np.array_equal(known, addition)
    found = eap_scores(Problem(case.model, prompts, case.graph, "logit_diff"))
    assert not found.notes
    # The record has what putting in the corrupted value does to the metric, to first order: our sign.
    # It was taken in FP32. In case c that leaves a rounding of 4e-5 on embed->a0.3.k (a score of -2.2, and the like on
    # another input of that head): in float64 the score is -2.227564, recorded is -2.227607, ours in FP32 -2.227566.
    errors = np.abs(found.values[known] - expected[known])
    assert (errors > 1e-5).sum() <= 2 * name.startswith("c_")
    np.testing.assert_allclose(found.values[known], expected[known], rtol=2e-5, atol=1e-5)


# --- where first order is all there is ------------------------------------------------------------------------


def linear_model(seed: int, groups: int = 2, parallel: bool = False) -> Transformer:
    """No norms, attention patterns that no input changes, MLPs whose ReLU never bends."""
    cfg = small_config(n_layers=3, n_heads=4, n_kv_heads=groups, act="relu", parallel=parallel)
    weights = random_weights(cfg, seed, set())
    for layer in range(cfg.n_layers):
        for name in ("W_Q", "W_K"):
            weights[f"blocks.{layer}.attn.{name}"] *= 0.0
        weights[f"blocks.{layer}.mlp.b_in"] += 1e3
        weights[f"blocks.{layer}.mlp.W_out"] *= 1e-2  # so that no MLP moves the next one that far
    return build(cfg, weights)


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
@pytest.mark.parametrize("options", [{}, {"split_qkv": False}, {"split_pos": True}, {"direct_edges": False}])
def test_on_a_linear_model_eap_is_exact(ablation: str, options: dict[str, bool]) -> None:
    for seed, (groups, parallel) in enumerate([(4, False), (2, True)]):
        model = linear_model(seed, groups, parallel)
        problem = Problem(model, pairs(3, 5, 11), Graph(model.config, **options), "logit_diff", ablation)
        exact = exact_scores(problem).values
        assert np.abs(exact).max() > 0.1
        for found in (
            eap_scores(problem),
            eap_scores(problem, EapOptions("corrupted")),
            eap_ig_scores(problem, EapIgOptions(steps=2)),
            eap_ig_scores(problem, EapIgOptions("clean-corrupted")),
        ):
            np.testing.assert_allclose(found.values, exact, rtol=0, atol=1e-8)


def one_layer(**more: Any) -> Transformer:
    """Silent heads, so that the MLP is all that bends, and the embedding all that it reads."""
    cfg = small_config(n_layers=1, **more)
    weights = random_weights(cfg, 3, set())
    weights["blocks.0.attn.W_O"] *= 0.0
    return build(cfg, weights)


@pytest.mark.parametrize("ablation", ["resample", "zero"])
def test_more_steps_come_nearer_to_the_exact_effect_where_the_path_is_the_one_that_removal_takes(ablation: str) -> None:
    """Integrated gradients equal a finite change along their own path, here: the embedding's way through one MLP.

    With silent heads and a metric that is linear in the logits, only m0 bends; its input moves from the clean to the
    reference run both when embed->m0 is removed and along the path of embeddings. (Edges into nodes whose other
    inputs move along, too, are on another path: there is no such promise for them.)
    """
    model = one_layer()
    problem = Problem(model, pairs(4, 4, 11), Graph(model.config), "logit_diff", ablation)
    exact = exact_scores(problem).values
    at = problem.graph.edge("embed->m0")
    errors = [abs(eap_ig_scores(problem, EapIgOptions(steps=n)).values[at] - exact[at]) for n in (1, 4, 16, 64, 256)]
    assert errors[0] > 0.01 * abs(exact[at])
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.01 * errors[0] + 1e-6
    for other in ("embed->logits", "m0->logits"):  # linear: exact at once
        at = problem.graph.edge(other)
        assert eap_ig_scores(problem, EapIgOptions(steps=1)).values[at] == pytest.approx(exact[at], abs=1e-9)


def test_activations_are_a_mean_over_all_senders_in_turn() -> None:
    """In that model: the path's mean with the embedding on its way, the clean gradient with the heads, none with m0."""
    model = one_layer()
    problem = Problem(model, pairs(4, 4, 11), Graph(model.config), "logit_diff")
    path, clean = (eap_ig_scores(problem, EapIgOptions(steps=7)).values, eap_scores(problem).values)
    found = eap_ig_scores(problem, EapIgOptions("activations", steps=7))
    assert found.stats["gradients"] == 3 * 7
    at = problem.graph.edge("embed->m0")
    assert found.values[at] == pytest.approx((path[at] + clean[at] + 0.0) / 3, abs=1e-9)
    at = problem.graph.edge("embed->logits")
    assert found.values[at] == pytest.approx(clean[at], abs=1e-9)


@drawn(15)
@given(case=cases(metrics=SLOPED))
def test_a_single_step_is_eap_and_two_ends_are_a_mean(case: Case) -> None:
    problem = problem_of(case)
    if is_flat(case.model, case.prompts, case.metric):  # a probability that nothing moves any more
        return
    clean, far = (eap_scores(problem, EapOptions(base)).values for base in ("clean", "corrupted"))
    single, ends = (eap_ig_scores(problem, EapIgOptions(v, 1)).values for v in ("inputs", "clean-corrupted"))
    scale = 1e-9 * (np.abs(clean).max() + np.abs(far).max()) + 1e-12
    np.testing.assert_allclose(single, clean, rtol=0, atol=scale)
    np.testing.assert_allclose(ends, (clean + far) / 2, rtol=0, atol=scale)


# --- gradients that vanish ------------------------------------------------------------------------------------


@drawn(30)
@given(case=cases())
def test_metrics_that_are_least_at_the_clean_run_are_found_out(case: Case) -> None:
    base = case.metric.partition(":")[0]
    if base in FLAT:
        assert is_flat(case.model, case.prompts, case.metric)
    elif base == "logit_diff":
        assert not is_flat(case.model, case.prompts, case.metric)


@pytest.mark.parametrize("metric", FLAT)
def test_a_fallback_stands_in_for_a_metric_without_slope(metric: str) -> None:
    model = transformer(2, 2)
    prompts, graph = RandomTask().prompts(model, 4), Graph(model.config)

    def scores(metric: str, *fallbacks: str) -> Scores:
        return eap_scores(Problem(model, prompts, graph, metric, fallbacks=fallbacks))

    expected = scores("logit_diff")
    found = scores(metric, "l2", "logit_diff", "nll")
    assert np.array_equal(found.values, expected.values)
    assert found.stats["metric"] == "logit_diff"
    assert found.notes == (
        f"metric '{metric}' has no slope at the clean run, where all its first-order scores vanish; "
        "scores are those of metric 'logit_diff'",
    )
    alone = scores(metric)
    assert alone.stats["metric"] == metric
    assert alone.stats["base"] == "corrupted"
    assert alone.notes[0].endswith("gradients are taken at the corrupted run")
    corrupted = eap_scores(Problem(model, prompts, graph, metric), EapOptions("corrupted"))
    assert np.array_equal(alone.values, corrupted.values)
    assert not corrupted.notes
    assert np.abs(alone.values).max() > 1e-4
    with pytest.raises(PahqError, match="a single step looks nowhere else; take 2 steps or more"):
        eap_ig_scores(Problem(model, prompts, graph, metric), EapIgOptions(steps=1))
    assert np.abs(eap_ig_scores(Problem(model, prompts, graph, metric)).values).max() > 1e-4


def test_a_fallback_that_the_prompts_do_not_allow_is_passed_over() -> None:
    model = transformer(2, 2)
    prompts = RandomTask().prompts(model, 4)
    nothing = torch.full_like(prompts.wrong, -1)
    problem = Problem(
        model, dataclasses.replace(prompts, wrong=nothing), Graph(model.config), fallbacks=("logit_diff", "nll")
    )
    assert eap_scores(problem).stats["metric"] == "nll"


@pytest.mark.parametrize("policy", ["pahq", "bf16-values", "rtn"])
def test_low_precision_finds_out_a_metric_without_slope_all_the_same(policy: str) -> None:
    """KL to the full-precision model is no longer 0 where values are rounded, and what is left is noise."""
    model = transformer(2, 2)
    problem = Problem(
        model, RandomTask().prompts(model, 4), Graph(model.config), policy=get_policy(policy), fallbacks=("logit_diff",)
    )
    found = eap_scores(problem)
    assert found.stats["metric"] == "logit_diff"
    exact = eap_scores(dataclasses.replace(problem, policy=FP32)).values
    if policy != "rtn":
        assert np.corrcoef(found.values[problem.graph.edges], exact[problem.graph.edges])[0, 1] > 0.95


# --- runs -----------------------------------------------------------------------------------------------------


class Kept:
    """Keeps what a method saves, and stops it after so many times."""

    def __init__(self, stop: int = -1) -> None:
        self.stop, self.saves, self.seen = stop, 0, [(0, 1)]
        self.state: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def progress(self, done: int, total: int) -> None:
        self.seen.append((done, total))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.state

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.state = {name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(dict(facts)))
        self.saves += 1
        if self.saves == self.stop:
            raise KeyboardInterrupt


def methods(problem: Problem, work: Kept) -> list[Any]:
    variants = [EapIgOptions("inputs", 3), EapIgOptions("activations", 2), EapIgOptions("clean-corrupted")]
    return [
        lambda: eap_scores(problem, EapOptions(), work),
        *(lambda options=options: eap_ig_scores(problem, options, work) for options in variants),
        lambda: exact_scores(problem, None, work),
    ]


@pytest.mark.parametrize("which", range(5))
def test_a_stopped_run_goes_on_to_the_same_scores(which: int) -> None:
    model = transformer(2, 2)
    problem = Problem(model, RandomTask().prompts(model, 5), Graph(model.config), "logit_diff", memory_limit=140_000)
    whole = Kept()
    expected = methods(problem, whole)[which]()
    assert whole.seen[-1][0] == whole.seen[-1][1]
    assert [done for done, _ in whole.seen] == sorted({done for done, _ in whole.seen})
    assert whole.saves > 1
    for stop in range(1, whole.saves + 1, max(1, whole.saves // 6)):
        work = Kept(stop)
        with pytest.raises(KeyboardInterrupt):
            methods(problem, work)[which]()
        found = methods(problem, work)[which]()
        assert np.array_equal(found.values, expected.values)
        assert found.stats == expected.stats


def test_a_state_of_other_options_is_refused() -> None:
    model = transformer(1, 2)
    problem = Problem(model, RandomTask().prompts(model, 2), Graph(model.config), "logit_diff")
    work = Kept()
    eap_ig_scores(problem, EapIgOptions(steps=2), work)
    with pytest.raises(PahqError, match="kept for 2 base points of 1 pieces, not for 3 of 1"):
        eap_ig_scores(problem, EapIgOptions(steps=3), work)


def test_bad_options_take_one_line() -> None:
    bad: list[tuple[Any, dict[str, Any], str]] = [
        (EapOptions, {"base": "middle"}, "base 'middle' is unknown; choose one of clean, corrupted"),
        (EapIgOptions, {"variant": "a"}, "variant 'a' is unknown; choose one of inputs, activations, clean-corrupted"),
        (EapIgOptions, {"steps": 0}, "steps 0: give a whole number of at least 1, for example 5"),
        (EapIgOptions, {"steps": 2.5}, "steps 2.5: give a whole number of at least 1, for example 5"),
    ]
    for options, values, line in bad:
        with pytest.raises(PahqError) as error:
            options(**values)
        assert str(error.value) == line


def test_gradients_that_are_not_finite_stop_in_one_line() -> None:
    model = transformer(1, 2)
    weights = dict(model.weights)
    weights["blocks.0.attn.W_V"] = weights["blocks.0.attn.W_V"] * 1e38
    broken = build(model.config, weights)
    problem = Problem(broken, RandomTask().prompts(broken, 2), Graph(model.config), "logit_diff")
    for make in (lambda: eap_scores(problem, EapOptions("corrupted")), lambda: eap_ig_scores(problem)):
        with pytest.raises(PahqError, match=r"metric 'logit_diff'.*(NaN|nan|inf)"):
            make()


SCRIPT = """
import sys
sys.path.insert(0, "tests")
import numpy, torch
from test_attribution import all_scores
torch.set_num_threads(1)
one = all_scores()
torch.set_num_threads(2)
numpy.savez(sys.argv[1], one=one, two=all_scores())
"""


def all_scores() -> np.ndarray:
    """What all methods here find on a small model: [methods, R, S + 1]."""
    model = transformer(2, 2)
    problem = Problem(model, RandomTask().prompts(model, 3), Graph(model.config), "logit_diff")
    return np.stack([methods(problem, Kept())[which]().values for which in range(5)])


def test_neither_hash_seed_nor_threads_change_a_score(tmp_path: Path) -> None:
    """Bit for bit, but for sums that are cut differently for two threads."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "scores.npz"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parent.parent,
    )
    assert done.returncode == 0, done.stderr
    there, here = np.load(tmp_path / "scores.npz"), all_scores()  # with this process's own hash seed
    assert np.array_equal(there["one"], here)
    np.testing.assert_allclose(there["two"], here, rtol=0, atol=1e-5 * np.abs(here).max())


def test_nodes_are_where_the_names_say() -> None:
    graph = Graph(small_config())
    assert graph.edge(_our_name("Resid Start->A1.1.K")) == (graph.receiver_index[Receiver("k", 1, 1)], 0)
    assert graph.edge(_our_name("A0.1->MLP 0"))[1] == graph.sender_index[Sender("head", 0, 1)]
