"""Edges are counted, ordered and named as published."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pahq.errors import PahqError
from pahq.graph import Graph, Receiver, Sender
from pahq.model.config import ModelConfig


def config(n_layers: int, n_heads: int, d_mlp: int = 4, **more: Any) -> ModelConfig:
    fixed: dict[str, Any] = {
        "n_kv_heads": n_heads,
        "d_model": 4,
        "d_head": 2,
        "d_vocab": 5,
        "d_vocab_out": 5,
        "n_ctx": 8,
    }
    return ModelConfig(n_layers=n_layers, n_heads=n_heads, d_mlp=d_mlp, **(fixed | more))


@pytest.mark.parametrize(
    ("cfg", "addition", "direct"),
    [
        pytest.param(config(12, 12), 32_491, 432, id="GPT-2 small"),
        pytest.param(config(4, 8, d_mlp=0), 1_281, 96, id="attn-only-4l"),
        pytest.param(config(2, 8, d_mlp=0), 257, 48, id="redwood_attn_2l"),
        pytest.param(config(30, 9, n_kv_heads=3), 70_651, 450, id="SmolLM2-135M"),
        pytest.param(config(4, 8), 1_519, 96, id="4 layers, 8 heads"),
        pytest.param(config(2, 4, d_mlp=0), 81, 24, id="2 layers, 4 heads, attention only"),
    ],
)
def test_published_counts(cfg: ModelConfig, addition: int, direct: int) -> None:
    graph = Graph(cfg)
    assert (graph.n_addition, graph.n_direct, graph.n_edges) == (addition, direct, addition + direct)
    assert graph.edges.shape == graph.shape == (len(graph.receivers), len(graph.senders) + 1)


def sees(graph: Graph, receiver: str) -> str:
    row = [r.name for r in graph.receivers].index(receiver)
    return " ".join(graph.sender_name(column) for column in np.flatnonzero(graph.edges[row]).tolist())


def test_who_reads_whom() -> None:
    graph = Graph(config(2, 2))
    assert sees(graph, "a0.1.k") == "embed direct"
    assert sees(graph, "m0") == "embed a0.0 a0.1"
    assert sees(graph, "a1.0.q") == "embed a0.0 a0.1 m0 direct"
    assert sees(graph, "m1") == "embed a0.0 a0.1 m0 a1.0 a1.1"
    assert sees(graph, "logits") == "embed a0.0 a0.1 m0 a1.0 a1.1 m1"


def test_parallel_blocks_hide_a_layers_heads_from_its_mlp() -> None:
    graph = Graph(config(2, 2, parallel=True))
    assert sees(graph, "m1") == "embed a0.0 a0.1 m0"
    assert sees(graph, "m0") == "embed"
    assert sees(graph, "logits") == "embed a0.0 a0.1 m0 a1.0 a1.1 m1"


def test_grouped_query_attention_has_keys_and_values_once_a_group() -> None:
    graph = Graph(config(1, 6, n_kv_heads=2))
    kinds = [receiver.kind for receiver in graph.receivers]
    assert [kinds.count(kind) for kind in ("q", "k", "v")] == [6, 2, 2]
    assert list(graph.heads_of(Receiver("q", 0, 4))) == [4]
    assert list(graph.heads_of(Receiver("v", 0, 1))) == [3, 4, 5]
    assert graph.n_direct == 10


def test_options() -> None:
    cfg = config(2, 4, n_kv_heads=2)
    joint = Graph(cfg, split_qkv=False)
    assert [r.name for r in joint.receivers] == ["a0.0.qkv", "a0.1.qkv", "m0", "a1.0.qkv", "a1.1.qkv", "m1", "logits"]
    assert list(joint.heads_of(Receiver("qkv", 0, 1))) == [2, 3]
    assert joint.n_direct == 4
    without = Graph(cfg, direct_edges=False)
    assert without.n_direct == 0
    assert without.n_addition == Graph(cfg).n_addition
    split = Graph(cfg, split_pos=True)
    assert sees(split, "m0") == "embed pos_embed a0.0 a0.1 a0.2 a0.3"
    assert split.n_addition == Graph(cfg).n_addition + len(split.receivers)
    assert split.options() == {"split_qkv": True, "direct_edges": True, "split_pos": True}


@pytest.mark.parametrize("options", [{}, {"split_qkv": False}, {"split_pos": True}, {"direct_edges": False}])
def test_names_lead_back_to_edges(options: dict[str, bool]) -> None:
    graph = Graph(config(2, 4, n_kv_heads=2), **options)
    edges = [(int(row), int(column)) for row, column in zip(*np.nonzero(graph.edges), strict=True)]
    names = [graph.edge_name(*edge) for edge in edges]
    assert len(set(names)) == graph.n_edges
    assert [graph.edge(name) for name in names] == edges


def test_readable_names() -> None:
    graph = Graph(config(12, 12))
    assert graph.edge_name(*graph.edge(" a5.5 -> a9.6.q ")) == "a5.5->a9.6.q"
    assert graph.edge_name(*graph.edge("direct->a9.6.v")) == "direct->a9.6.v"
    assert [str(Sender("mlp", 3)), str(Receiver("logits", 12)), str(Receiver("k", 1, 2))] == ["m3", "logits", "a1.2.k"]


@pytest.mark.parametrize("name", ["m0", "m3->m3", "m5->a2.0.q", "a0.99->logits", "direct->m0", "embed->a0.0", ""])
def test_edges_that_do_not_exist_are_refused_by_name(name: str) -> None:
    with pytest.raises(PahqError, match=f"edge '{name}' does not exist in model"):
        Graph(config(12, 12)).edge(name)


def test_split_pos_needs_a_learned_position_embedding() -> None:
    with pytest.raises(PahqError, match="'rotary' positions; turn split_pos off"):
        Graph(config(1, 1, positions="rotary", rotary_dim=2), split_pos=True)
