"""The engine's cost per tested edge, in plain forward passes of the same batch (plain-forward equivalents, PFE).

(a) bench4: 4 layers of 8 heads, d_model 256, d_mlp 1024, vocabulary 1,000, folded LayerNorm, GELU-new, random
    weights, 32 prompts of 16 tokens, KL at the last position, threshold 0.01, one thread.
(b) smollm2: SmolLM2-135M, ioi, 16 prompts (another draw for every repeat), KL, threshold 0.05, all threads.

The plain pass (hooks off, logits at the last position only) is timed before and after every sweep, with
transformers and with bare torch; the faster of the two counts. Beside it: the same edges evaluated by whole
forward passes, and by passes that start at the receiver's layer, both on a sample spread over the sweep.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from common import finish, header, median, parser, seconds
from pahq.engine.full import FullEvaluator
from pahq.engine.marks import Marks
from pahq.method.acdc import Acdc, AcdcOptions, AcdcResult
from pahq.method.sweep import Sweep, visits
from pahq.model import ModelConfig, Transformer, build, load_model
from pahq.model.transformer import shapes
from pahq.report.machine import gemm_peak
from pahq.task import get_task
from pahq.task.metrics import LogitsReadout, get_metric
from pahq.task.prompts import Prompts, last_position

# Half the spread of the golden case c_mlp4l8h: the sweep then tests about 1,000 edges, as the public codes' did.
SPREAD = {"E": 0.5, "pos": 0.35, "QK": 0.1, "V": 0.1, "O": 0.1, "mlp": 0.05, "U": 0.1, "b": 0.1}
KINDS = {"W_E": "E", "W_pos": "pos", "W_Q": "QK", "W_K": "QK", "W_V": "V", "W_O": "O", "W_in": "mlp", "W_out": "mlp"}


def bench4(seed: int = 303) -> tuple[Transformer, Prompts]:
    """The random model and its prompts; head gains are log-normal, so that some heads matter more than others."""
    cfg = ModelConfig(4, 8, 8, 256, 32, 1024, 1000, 1000, 16, norm="layer", act="gelu_new", name="bench4")
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (shape, _) in shapes(cfg).items():
        part = name.split(".")[-1]
        if part.startswith("W_"):
            weights[name] = torch.randn(shape, generator=draw) * SPREAD[KINDS.get(part, "U")]
            if part == "W_O":
                weights[name] *= torch.exp(torch.randn(shape[0], generator=draw))[:, None, None]
        elif part.startswith("b_"):
            weights[name] = torch.randn(shape, generator=draw) * SPREAD["b"]
    clean, corrupt = (torch.randint(0, 1000, (32, 16), generator=draw) for _ in range(2))
    return build(cfg, weights), last_position(clean, corrupt, [[]] * 32, [[]] * 32)


def plain_passes(model: Transformer, prompts: Prompts) -> dict[str, Callable[[], object]]:
    """Plain forward passes of this geometry: our own bare torch, and transformers' model class (random weights)."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    cfg = model.config
    if cfg.architecture == "llama":
        config: Any = LlamaConfig(
            vocab_size=cfg.d_vocab,
            hidden_size=cfg.d_model,
            intermediate_size=cfg.d_mlp,
            num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads,
            num_key_value_heads=cfg.n_kv_heads,
            tie_word_embeddings=True,
        )
    else:
        config = GPT2Config(
            vocab_size=cfg.d_vocab,
            n_positions=cfg.n_ctx,
            n_embd=cfg.d_model,
            n_layer=cfg.n_layers,
            n_head=cfg.n_heads,
            bos_token_id=None,
            eos_token_id=None,
        )
    other = AutoModelForCausalLM.from_config(config).eval()

    def bare() -> Any:
        return model.unembed(model.residual(prompts.clean)[:, -1])

    @torch.no_grad()
    def transformers() -> Any:
        return other(prompts.clean, logits_to_keep=1, use_cache=False)

    return {"bare torch": bare, "transformers": transformers}


def whole_passes(acdc: Acdc, result: AcdcResult, model: Transformer, prompts: Prompts, sample: int) -> dict[str, float]:
    """Seconds per state of whole passes and of passes from the receiver's layer on, over a sample of the tests.

    Also the largest difference between their metric and the engine's.
    """
    graph, options = result.graph, acdc.options
    evaluator, later = (FullEvaluator(model, prompts, graph, options.ablation) for _ in range(2))
    clean = model.unembed(model.residual(prompts.clean)[:, -1:])
    metric = get_metric(options.metric, prompts, clean)
    chosen = set(np.linspace(0, len(result.decisions) - 1, sample).astype(int).tolist())
    sweep = Sweep(
        visits(graph, options.head_order == "ascending", options.sender_order == "earliest"), Marks.full(graph)
    )
    whole, partial, error = [], [], 0.0
    evaluator.logits(sweep.marks.mask, sweep.marks.finished)
    later.logits(sweep.marks.mask, sweep.marks.finished, model.config.n_layers)
    for decision in result.decisions:
        sweep.peek()
        if decision.order in chosen:
            mask, receiver = sweep.marks.mask.copy(), graph.receivers[decision.row]
            mask[decision.row, decision.column] = False
            visited = sweep.marks.finished.copy()
            visited[decision.row] = True
            whole.append(seconds(lambda m=mask, v=visited: evaluator.logits(m, v)))
            logits = evaluator.logits(mask, visited)
            start = min(receiver.layer, model.config.n_layers)
            partial.append(seconds(lambda m=mask, v=visited, s=start: later.logits(m, v, s)))
            error = max(error, abs(float(metric(LogitsReadout(logits))[0]) - decision.after))
        sweep.decide(decision.kept)
    return {
        "whole_s": float(np.mean(whole)),
        "from_layer_s": float(np.mean(partial)),
        "sampled": float(len(whole)),
        "largest_metric_difference": error,
    }


def measure(
    name: str, model: Transformer, draws: list[Prompts], threshold: float, sample: int, screen: bool | None
) -> tuple[float, dict[str, Any]]:
    """A sweep for each draw of prompts, interleaved with plain passes -> (median PFE, everything worth knowing).

    Counts, FLOPs and the comparison with whole passes are those of the last draw.
    """
    prompts = draws[0]
    passes = plain_passes(model, prompts)
    for call in passes.values():
        seconds(call)
    plain: dict[str, list[float]] = {which: [] for which in passes}
    runs: list[tuple[float, float]] = []
    acdc = result = None
    for prompts in draws:
        around: dict[str, list[float]] = {which: [] for which in passes}

        def time_plain(store: dict[str, list[float]] = around) -> None:
            for _ in range(5):
                for which, call in passes.items():
                    store[which].append(seconds(call))

        time_plain()
        start = time.perf_counter()
        acdc = Acdc(model, prompts, AcdcOptions(threshold), screen=screen)
        result = acdc.run()
        spent = time.perf_counter() - start  # the clean and the corrupted run included
        time_plain()
        for which, values in around.items():
            plain[which] += values
        print(f"  {name}: {len(result.decisions)} tests in {spent:.1f} s", flush=True)
        runs.append((spent / len(result.decisions), min(median(v) for v in around.values())))
    assert acdc is not None
    assert result is not None
    pfe = median([per_test / forward for per_test, forward in runs])
    stats, flops = result.stats, result.stats["flops"]
    peak = gemm_peak(torch.device("cpu"))
    base = whole_passes(acdc, result, model, prompts, sample)
    per_test = median([run[0] for run in runs])
    details = {
        "plain_s": {which: median(values) for which, values in plain.items()},
        "per_test_s": per_test,
        "pfe_of_each_repeat": [per_test / forward for per_test, forward in runs],
        **{key: stats[key] for key in ("tests", "states", "wasted", "batches", "escalated", "seconds")},
        "kept": int(result.mask.sum()),
        "mflop_per_test": {part: count / len(result.decisions) / 1e6 for part, count in flops.items()},
        "share_of_peak": sum(flops.values()) / stats["seconds"] / peak,
        "full_forward": base,
    }
    print(f"\n{name}: {stats['tests']} tests, {stats['states']} states in {stats['batches']} batches, "
          f"{stats['wasted'] / stats['states']:.0%} wasted, {details['kept']} edges kept")  # fmt: skip
    print("  plain pass: " + ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in details["plain_s"].items()))
    print(f"  a test: {per_test * 1e3:.2f} ms = {pfe:.4f} PFE (each repeat: "
          + ", ".join(f"{x:.4f}" for x in details["pfe_of_each_repeat"]) + ")")  # fmt: skip
    print("  MFLOP a test: " + ", ".join(f"{k} {v:.1f}" for k, v in details["mflop_per_test"].items())
          + f"; {details['share_of_peak']:.0%} of this machine's FP32 peak")  # fmt: skip
    print(f"  whole forward passes: {base['whole_s'] / per_test:.0f} times as long; from the receiver's layer on: "
          f"{base['from_layer_s'] / per_test:.0f} times ({sample} tests sampled; metrics differ by at most "
          f"{base['largest_metric_difference']:.1e})")  # fmt: skip
    return pfe, details


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("--repeats", type=int, default=3, help="sweeps of each case (default 3)")
    options.add_argument("--full-vocabulary", action="store_true", help="smollm2 once more without the screen")
    options.add_argument("--only", choices=["bench4", "smollm2"], help="one case alone")
    given = options.parse_args()
    facts, figures, details = header(), {}, {}
    if given.only != "smollm2":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        model, prompts = bench4()
        figures["pfe_bench4"], details["bench4"] = measure(
            "bench4 (one thread)", model, [prompts] * given.repeats, 0.01, 40, None
        )
        torch.set_num_threads(threads)
    if given.only != "bench4":
        model = load_model("smollm2-135m")
        draws = [get_task("ioi").prompts(model, 16, seed=seed) for seed in range(given.repeats)]
        figures["pfe_smollm2"], details["smollm2"] = measure("smollm2", model, draws, 0.05, 12, None)
        if given.full_vocabulary:
            name = "smollm2_full_vocabulary"
            figures[f"pfe_{name}"], details[name] = measure(name, model, draws[-1:], 0.05, 12, False)
    for name in [key for key in details if "full_forward" in details[key]]:
        base = details[name]["full_forward"]
        figures[f"speedup_{name}"] = base["whole_s"] / details[name]["per_test_s"]
        figures[f"speedup_from_layer_{name}"] = base["from_layer_s"] / details[name]["per_test_s"]
    finish(given.out, facts, figures, details)


if __name__ == "__main__":
    main()
