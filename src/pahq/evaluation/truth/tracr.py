"""Circuits of compiled programs: tracr turns a RASP program into the weights of a transformer.

Every direction of such a model's residual stream holds one value of one program variable, so the circuit can be read
from the program: a head or MLP computes variables, and reads those that its weights take in. Source: Lindner et al.
2023 (arXiv 2301.05062). The two programs are those of Conmy et al. 2023. Compiling needs the extra ``tracr``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from pahq.errors import PahqError
from pahq.evaluation.truth.base import Truth, mask_of
from pahq.graph import Graph, Receiver, Sender
from pahq.model.config import ModelConfig

if TYPE_CHECKING:
    from pahq.model import Transformer

BOS = "BOS"
LONGEST = 5
"""Tokens after the first that a program is compiled for."""
CONSTANTS = ("one", f"tokens:{BOS}")
"""Directions that the compiler needs (biases, the first position) and that no variable of a program stands for."""

_MODULES = ("jax", "tracr.compiler.compiling", "tracr.compiler.lib", "tracr.rasp.rasp")

PUBLISHED: dict[str, tuple[str, ...]] = {
    "tracr-reverse": (
        "embed->a0.0.v",
        "direct->a0.0.v",
        "embed->m0",
        "a0.0->m0",
        "embed->m1",
        "pos_embed->m1",
        "m0->m1",
        "m1->m2",
        "m2->a3.0.q",
        "pos_embed->a3.0.k",
        "embed->a3.0.v",
        "direct->a3.0.q",
        "direct->a3.0.k",
        "direct->a3.0.v",
        "a3.0->logits",
    ),
    "tracr-proportion": (
        "embed->m0",
        "embed->a1.0.q",
        "pos_embed->a1.0.q",
        "embed->a1.0.k",
        "pos_embed->a1.0.k",
        "m0->a1.0.v",
        "direct->a1.0.q",
        "direct->a1.0.k",
        "direct->a1.0.v",
        "a1.0->logits",
    ),
}
"""Conmy et al.'s edge sets, which zero-ablation ACDC found: figures against them under zero ablation are circular.

Their prompts for proportion did not begin with the first token that the program asks for, and had it elsewhere.
"""


@dataclass(frozen=True)
class Compiled:
    """A compiled program. labels: the value that each of the d_model directions holds, such as ``length:3``."""

    config: ModelConfig
    weights: Mapping[str, np.ndarray]
    labels: tuple[str, ...]


def names() -> dict[str, str]:
    return {
        "tracr-reverse": "a compiled program that reverses a list (needs the extra tracr)",
        "tracr-proportion": "a compiled program: the share of x among the tokens so far (needs the extra tracr)",
    }


def load(name: str) -> Truth:
    """The truth ``name`` of ``names``: what the compiled components read and compute, constants included.

    ``published`` holds Conmy et al.'s set, and as ``variables`` the edges that carry a program variable. Some edges of
    the truth do nothing on well-formed prompts (6 of reverse, 2 of proportion: a selector that is always true reads
    its operands in vain, and the attention to BOS in want of anything else is never called for), so no method that
    looks at effects can find all of them. Under resample ablation what is the same in both prompts, such as the
    length of the list, cannot be found either. Raises PahqError where tracr is not installed.
    """
    compiled = compile_program(name)
    graph = Graph(compiled.config, split_pos=True)
    reads, writes = flows(compiled, graph)
    return Truth(
        name=name,
        about=names()[name],
        graph=graph,
        mask=wiring(compiled, graph),
        metric="l2",
        ablation="zero",
        n=6 if name == "tracr-reverse" else 50,
        get_model=partial(_model, name),
        get_task=partial(_task, name),
        published={
            "published": mask_of(graph, PUBLISHED[name]),
            "variables": wiring(compiled, graph, without=CONSTANTS),
        },
        facts={
            "kind": "compiled",
            "source": "Lindner et al. 2023 (arXiv 2301.05062)",
            "writes": {str(sender): _variables(compiled, held) for sender, held in writes.items() if held.any()},
            "reads": {str(receiver): _variables(compiled, held) for receiver, held in reads.items() if held.any()},
        },
    )


@cache
def compile_program(name: str) -> Compiled:
    """Configuration, weights by TransformerLens' names and direction labels; PahqError where tracr is missing."""
    try:
        jax, compiling, lib, rasp = map(import_module, _MODULES)
    except ImportError as error:
        raise PahqError(
            f"truth '{name}': compiling it needs tracr, which is not there ({error}); pip install 'pahq[tracr]'"
        ) from None
    if name == "tracr-reverse":
        selected = rasp.Select(rasp.tokens, rasp.tokens, rasp.Comparison.TRUE)
        opposite = rasp.SelectorWidth(selected) - rasp.indices - 1
        flip = rasp.Select(rasp.indices, opposite, rasp.Comparison.EQ)
        program, vocabulary = rasp.Aggregate(flip, rasp.tokens), {1, 2, 3}
    else:
        program, vocabulary = lib.make_frac_prevs(rasp.tokens == "x"), {"w", "x", "y", "z"}
    with jax.default_device(jax.devices("cpu")[0]):
        model = compiling.compile_rasp_to_model(program, vocab=vocabulary, max_seq_len=LONGEST, compiler_bos=BOS)
        params = {key: np.asarray(value) for key, value in _flat(model.params).items()}
    return convert(name, params, model.model_config, tuple(model.residual_labels), program.label)


def convert(name: str, params: Mapping[str, np.ndarray], settings: Any, labels: tuple[str, ...], out: str) -> Compiled:
    """tracr's parameters -> weights by our names. out: label of the variable that the program gives back.

    params: by tracr's path, such as ``transformer/layer_0/attn/query/w``. settings: its TransformerConfig.
    """
    heads, layers, size = settings.num_heads, settings.num_layers, settings.key_size
    embedding, positions = params["token_embed/embeddings"], params["pos_embed/embeddings"]
    width = embedding.shape[1]
    weights = {"embed.W_E": embedding, "pos_embed.W_pos": positions}
    for layer in range(layers):
        theirs, ours = f"transformer/layer_{layer}", f"blocks.{layer}"
        for part, letter in (("query", "Q"), ("key", "K"), ("value", "V")):
            matrix, bias = (params[f"{theirs}/attn/{part}/{x}"] for x in "wb")
            weights[f"{ours}.attn.W_{letter}"] = matrix.reshape(width, heads, size).transpose(1, 0, 2)
            weights[f"{ours}.attn.b_{letter}"] = bias.reshape(heads, size)
        weights[f"{ours}.attn.W_O"] = params[f"{theirs}/attn/linear/w"].reshape(heads, size, width)
        weights[f"{ours}.attn.b_O"] = params[f"{theirs}/attn/linear/b"]
        for part, where in (("linear_1", "in"), ("linear_2", "out")):
            weights[f"{ours}.mlp.W_{where}"] = params[f"{theirs}/mlp/{part}/w"]
            weights[f"{ours}.mlp.b_{where}"] = params[f"{theirs}/mlp/{part}/b"]
    given = [index for index, label in enumerate(labels) if label == out or label.startswith(f"{out}:")]
    weights["unembed.W_U"] = np.eye(width, dtype=embedding.dtype)[:, given]
    config = ModelConfig(
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        d_model=width,
        d_head=size,
        d_mlp=settings.mlp_hidden_size,
        d_vocab=embedding.shape[0],
        d_vocab_out=len(given),
        n_ctx=positions.shape[0],
        positions="learned",
        norm="none",
        act="relu",
        causal=settings.causal,
        name=name,
        architecture="tracr",
    )
    return Compiled(config, {key: np.ascontiguousarray(value) for key, value in weights.items()}, labels)


def flows(compiled: Compiled, graph: Graph) -> tuple[dict[Receiver, np.ndarray], dict[Sender, np.ndarray]]:
    """Which directions each receiver reads and each sender writes: bool [d_model] each.

    Of a matrix product, what the other factor never takes up is neither read nor written.
    """
    w = {name: value != 0 for name, value in compiled.weights.items()}
    reads: dict[Receiver, np.ndarray] = {}
    writes: dict[Sender, np.ndarray] = {}
    for sender in graph.senders:
        if sender.kind == "head":
            value, out = (w[f"blocks.{sender.layer}.attn.W_{x}"][sender.index] for x in "VO")
            writes[sender] = out[value.any(axis=0)].any(axis=0)
        elif sender.kind == "mlp":
            first, second = (w[f"blocks.{sender.layer}.mlp.W_{x}"] for x in ("in", "out"))
            writes[sender] = second[first.any(axis=0)].any(axis=0)
        else:
            writes[sender] = w["embed.W_E" if sender.kind == "embed" else "pos_embed.W_pos"].any(axis=0)
    for receiver in graph.receivers:
        at = f"blocks.{receiver.layer}"
        if receiver.kind == "logits":
            reads[receiver] = w["unembed.W_U"].any(axis=1)
        elif receiver.kind == "mlp":
            reads[receiver] = w[f"{at}.mlp.W_in"][:, w[f"{at}.mlp.W_out"].any(axis=1)].any(axis=1)
        else:
            own, other = {"q": "QK", "k": "KQ", "v": "VO"}[receiver.kind]
            taken = w[f"{at}.attn.W_{other}"][receiver.index].any(axis=1 if other == "O" else 0)
            reads[receiver] = w[f"{at}.attn.W_{own}"][receiver.index][:, taken].any(axis=1)
    return reads, writes


def wiring(compiled: Compiled, graph: Graph, without: tuple[str, ...] = ()) -> np.ndarray:
    """The edges over which a direction goes from a sender to a receiver, and the direct edges of receivers in use.

    without: labels of directions that do not count. bool [n_receivers, n_senders + 1].
    """
    counted = np.array([label not in without for label in compiled.labels])
    reads, writes = flows(compiled, graph)
    mask = np.zeros(graph.shape, dtype=bool)
    for row, receiver in enumerate(graph.receivers):
        for column, sender in enumerate(graph.senders):
            mask[row, column] = (reads[receiver] & writes[sender] & counted).any()
        mask[row, graph.direct] = reads[receiver].any()
    return mask & graph.edges


def _variables(compiled: Compiled, held: np.ndarray) -> list[str]:
    """Variables of the directions marked in ``held``; constants by their own labels."""
    found = (compiled.labels[int(i)] for i in np.flatnonzero(held))
    # tracr numbers expressions in the order in which a process makes them
    return sorted({x if x in CONSTANTS else re.sub(r"_\d+(?=_|$)", "", x.partition(":")[0]) for x in found})


def _flat(params: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{module}/{name}": value for module, part in params.items() for name, value in part.items()}


def _model(name: str) -> Transformer:
    import torch

    from pahq.model import build

    compiled = compile_program(name)
    weights = {key: torch.from_numpy(value.copy()) for key, value in compiled.weights.items()}
    return build(compiled.config, weights, source={"kind": "tracr", "program": name})


def _task(name: str) -> Any:
    from pahq.evaluation.truth.tracr_task import Proportion, Reverse

    tasks: dict[str, Callable[[], Any]] = {"tracr-reverse": Reverse, "tracr-proportion": Proportion}
    return tasks[name]()
