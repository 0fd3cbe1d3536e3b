"""Reads the recorded ACDC runs that the golden tests compare with."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pahq.graph import Graph, Receiver, Sender
from pahq.method.acdc import HeadOrder, SenderOrder
from pahq.model.config import ModelConfig
from pahq.model.transformer import Transformer, build
from pahq.task.prompts import Prompts

ROOT = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """PAHQ_GOLDEN, or the usual place beside the repository."""
    return Path(os.environ.get("PAHQ_GOLDEN", ROOT / "../shared/golden"))


def case_names() -> list[str]:
    return sorted(path.parent.name for path in folder().glob("*/config.json"))


@dataclass(frozen=True)
class Recorded:
    """One tested edge as it was recorded."""

    row: int
    column: int
    before: float
    after: float
    effect: float
    kept: bool


@dataclass(frozen=True)
class Case:
    """One recorded run. The recorded options are turned into ours by the properties."""

    name: str
    model: Transformer
    prompts: Prompts
    clean_logits: torch.Tensor
    graph: Graph
    metric: str
    threshold: float
    options: dict[str, Any]
    evals: list[Recorded]
    kept: set[tuple[int, int]]
    final_metric: float

    @property
    def head_order(self) -> HeadOrder:
        return "descending" if mode(self.options["indices_mode"]) == "normal" else "ascending"

    @property
    def sender_order(self) -> SenderOrder:
        return "latest" if mode(self.options["names_mode"]) == "normal" else "earliest"

    @property
    def ablation(self) -> str:
        return "zero" if self.options["zero_ablation"] else "resample"

    @property
    def absolute(self) -> bool:
        return self.options["abs_value_threshold"]


def mode(value: str) -> str:
    if value not in ("normal", "reverse"):
        raise ValueError(f"golden case: order '{value}' is unknown")
    return value


def model_config(raw: dict[str, Any], name: str) -> ModelConfig:
    kind = raw["normalization_type"]
    if kind not in ("LN", "LNPre", None):
        raise ValueError(f"{name}: unknown normalization_type {kind}")
    return ModelConfig(
        n_layers=raw["n_layers"],
        n_heads=raw["n_heads"],
        n_kv_heads=raw["n_heads"],
        d_model=raw["d_model"],
        d_head=raw["d_head"],
        d_mlp=0 if raw["attn_only"] else raw["d_mlp"],
        d_vocab=raw["d_vocab"],
        d_vocab_out=raw.get("d_vocab_out", raw["d_vocab"]),
        n_ctx=raw["n_ctx"],
        positions="learned",
        norm="none" if kind is None else "layer",
        norm_eps=raw.get("eps", 1e-5),
        act=raw.get("act_fn", "relu"),
        causal=raw.get("attention_dir", "causal") == "causal",
        name=name,
    )


def node(graph: Graph, name: str, index: list[int | None]) -> Receiver | Sender:
    """A recorded node name (``blocks.1.hook_q_input``, head 3) -> ours."""
    if name in ("hook_embed", "blocks.0.hook_resid_pre"):
        return Sender("embed", -1)
    if name == "hook_pos_embed":
        return Sender("pos_embed", -1)
    _, number, hook = name.split(".", 2)
    layer, head = int(number), index[-1]
    if hook == "hook_resid_post":
        return Receiver("logits", graph.config.n_layers)
    if hook == "hook_mlp_out":
        return Sender("mlp", layer)
    if hook == "hook_mlp_in":
        return Receiver("mlp", layer)
    assert head is not None
    if hook == "attn.hook_result":
        return Sender("head", layer, head)
    for kind in ("q", "k", "v"):
        if hook in (f"hook_{kind}_input", f"attn.hook_{kind}"):
            return Receiver(kind, layer, head)
    raise ValueError(f"unknown node {name}")


def edge(graph: Graph, record: dict[str, Any]) -> tuple[int, int]:
    """A recorded edge -> its row and column in our mask."""
    child = node(graph, record["child"], record["child_index"])
    parent = node(graph, record["parent"], record["parent_index"])
    assert isinstance(child, Receiver)
    if isinstance(parent, Receiver):  # q_input -> q
        assert parent == child
        return graph.receiver_index[child], graph.direct
    return graph.receiver_index[child], graph.sender_index[parent]


def load(name: str) -> Case:
    """The case ``name``; the model is in double precision where the recorded run was."""
    here = folder() / name
    config = json.loads((here / "config.json").read_text())
    options = config["options"]
    io = np.load(here / "io.npz")
    clean_logits = torch.from_numpy(io["clean_logits"])
    with np.load(here / config.get("weights", "weights.npz")) as file:
        weights = {key: torch.from_numpy(file[key]).to(clean_logits.dtype) for key in file.files}
    model = build(model_config(config["model_cfg"], name), weights)
    graph = Graph(model.config, split_pos=options["use_pos_embed"])
    l2 = config["metric"].startswith("l2")
    clean, corrupt = (torch.from_numpy(io[key]) for key in ("clean", "corrupt"))
    n, length = clean.shape
    read = torch.arange(1, length).expand(n, -1) if l2 else torch.full((n, 1), length - 1)
    nothing = torch.full((*read.shape, 1), -1)
    prompts = Prompts(clean, corrupt, read, torch.ones_like(read, dtype=torch.bool), nothing, nothing)
    evals = [
        Recorded(
            *edge(graph, record), record["metric_before"], record["metric_after"], record["effect"], record["kept"]
        )
        for record in map(json.loads, (here / "evals.jsonl").read_text().splitlines())
    ]
    if (here / "edges.json").exists():
        records = json.loads((here / "edges.json").read_text())
        records = [r for r in records if r["edge_type"] != "PLACEHOLDER" and r["present"]]
    else:
        keys = ("child", "child_index", "parent", "parent_index")
        records: list[dict[str, Any]] = [dict(zip(keys, raw, strict=True)) for raw in config["kept_edges"]]
    return Case(
        name=name,
        model=model,
        prompts=prompts,
        clean_logits=clean_logits,
        graph=graph,
        metric="kl_div" if not l2 else "l2:0" if "output 0 only" in config["metric"] else "l2",
        threshold=config["threshold"],
        options=options,
        evals=evals,
        kept={edge(graph, record) for record in records},
        final_metric=config["results"]["final_metric"] if "results" in config else config["final_metric"],
    )
