"""Known circuits: what a truth is, and the canonical ones rebuilt from head groups."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import commands
from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.evaluation.truth import Truth, load_truth, node_mask, node_names, read_truth, truth_names
from pahq.evaluation.truth.base import mask_of, moved
from pahq.evaluation.truth.canonical import ATTN_ONLY_4L, GPT2_SMALL
from pahq.graph import Graph
from pahq.model.config import ModelConfig

COUNTS = {"ioi-gpt2": (963, 78), "greaterthan-gpt2": (235, 27), "docstring-attn-only-4l": (24, 13)}


def config(**changes: object) -> ModelConfig:
    sizes: dict[str, object] = {
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 4,
        "d_model": 8,
        "d_head": 2,
        "d_mlp": 8,
        "d_vocab": 5,
        "d_vocab_out": 5,
        "n_ctx": 8,
        "name": "toy",
    }
    return ModelConfig(**(sizes | changes))  # pyright: ignore[reportArgumentType]  (mixed field types)


def toy_truth(edges: list[str], graph: Graph | None = None) -> Truth:
    graph = Graph(config(), split_pos=True) if graph is None else graph
    return Truth("toy", "a toy", graph, mask_of(graph, edges))


@pytest.mark.parametrize("name", COUNTS)
def test_canonical_counts(name: str) -> None:
    truth = load_truth(name)
    assert (truth.n_addition, truth.n_direct) == COUNTS[name]
    assert truth.n_edges == sum(COUNTS[name])
    whole = (truth.graph.n_addition, truth.graph.n_direct)
    assert whole == ((1281, 96) if name.startswith("docstring") else (32491, 432))


@pytest.mark.parametrize("name", COUNTS)
def test_canonical_heads_are_whole_and_connected(name: str) -> None:
    """Every head that sends reads, every input that reads has its direct edge, and every node is used."""
    truth = load_truth(name)
    graph, mask = truth.graph, truth.mask
    reads = np.any(mask[:, : graph.direct], axis=1)
    attention = np.array([receiver.is_attention for receiver in graph.receivers])
    np.testing.assert_array_equal(reads[attention], mask[attention, graph.direct])
    receiving = {(r.layer, r.index) for r, used in zip(graph.receivers, reads, strict=True) if used and r.is_attention}
    sends = np.any(mask[:, : graph.direct], axis=0)
    sending = {(s.layer, s.index) for s, used in zip(graph.senders, sends, strict=True) if used and s.kind == "head"}
    assert sending == receiving


def test_ioi_members() -> None:
    truth = load_truth("ioi-gpt2")
    edges = set(truth.edge_names())
    assert sum("m" in name.replace("embed", "e") for name in edges) == 780
    inside = {
        *("embed->logits", "embed->m11", "m11->logits", "m3->m4", "m0->a9.9.q", "a0.1->m0", "a11.10->m11"),
        *("embed->a2.2.q", "embed->a2.2.k", "embed->a2.2.v", "embed->a7.3.q", "embed->a9.9.k", "embed->a10.7.v"),
        *("a2.2->a5.5.k", "a4.11->a5.8.v", "a4.11->a6.9.k", "a5.5->a7.3.v", "a6.9->a8.10.k", "a0.10->a8.6.v"),
        *("a7.3->a9.9.q", "a8.10->a11.9.q", "a8.6->a10.7.q", "a9.9->logits", "a11.9->logits", "a11.10->logits"),
        *("direct->a9.9.q", "direct->a9.9.k", "direct->a9.9.v", "direct->a4.11.k"),
    }
    outside = {
        *("a7.3->a9.9.k", "embed->a9.9.q", "embed->a7.3.k", "embed->a5.5.k", "a7.3->logits", "a5.5->logits"),
        *("a2.2->a5.5.q", "a5.5->a7.3.q", "a9.9->a10.7.q", "a0.1->a5.5.k", "a8.10->a8.6.q", "direct->a9.1.q"),
    }
    assert inside <= edges
    assert not outside & edges
    assert len([name for name in edges if name.endswith("->logits")]) == 1 + 12 + 13


def test_greaterthan_members() -> None:
    edges = set(load_truth("greaterthan-gpt2").edge_names())
    inside = {
        *("embed->a0.1.q", "embed->a0.5.v", "embed->m0", "embed->m3", "a0.1->m0", "a0.1->a5.5.q", "a0.3->a9.1.v"),
        *("m0->a5.5.v", "m3->a9.1.k", "m4->a5.5.q", "m8->a9.1.q", "a5.5->m8", "a8.11->m8", "a9.1->m9", "a9.1->logits"),
        *("m8->logits", "m11->logits", "m8->m9", "m0->m8", "m4->m7", "direct->a0.3.k"),
    }
    outside = {
        *("embed->m4", "embed->logits", "m4->a5.5.k", "m5->a5.5.q", "a0.3->m0", "a9.1->m8", "m7->m9", "m7->logits"),
        *("a5.5->m7", "a5.5->a9.1.q", "embed->a5.5.q", "a0.1->logits"),
    }
    assert inside <= edges
    assert not outside & edges


def test_docstring_members() -> None:
    edges = set(load_truth("docstring-attn-only-4l").edge_names())
    assert {"a0.5->a1.4.v", "a1.4->a3.0.q", "a1.2->a3.6.k", "a2.0->a3.0.k", "direct->a1.2.q"} <= edges
    assert not {"direct->a1.2.v", "direct->a0.5.q", "a0.5->logits", "a1.4->a2.0.q"} & edges


def test_models_of_canonical_circuits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("pahq.model.load_model", lambda name: asked.append(name), raising=False)
    load_truth("ioi-gpt2").model()
    load_truth("docstring-attn-only-4l").model()
    assert asked == ["gpt2", "attn-only-4l"]
    assert load_truth("greaterthan-gpt2").task().name == "greaterthan"
    with pytest.raises(PahqError, match="no model belongs to it"):
        toy_truth(["embed->m0"]).model()
    with pytest.raises(PahqError, match="no prompts belong to it"):
        toy_truth(["embed->m0"]).task()


def test_nodes_are_the_ends_of_edges() -> None:
    truth = toy_truth(["embed->m0", "m0->a1.2.v", "direct->a1.2.v", "direct->a1.3.q", "a1.2->logits"])
    names = np.array(node_names(truth.graph))
    present = set(names[node_mask(truth.graph, truth.mask)])
    assert present == {"embed", "m0.in", "m0", "a1.2.v", "a1.2", "a1.3.q", "logits"}
    assert len(set(names)) == len(names) == sum(truth.graph.shape) - 1
    with pytest.raises(PahqError, match="does not fit"):
        node_mask(truth.graph, truth.mask[1:])


def test_other_views_of_the_same_model() -> None:
    truth = toy_truth(
        ["embed->m0", "pos_embed->m0", "pos_embed->a0.1.q", "embed->a1.0.k", "m0->a1.0.v", "direct->a1.0.v"]
    )

    def names(**options: bool) -> set[str]:
        graph = Graph(config(), **options)
        mask = truth.on(graph)
        return {graph.edge_name(*map(int, at)) for at in np.argwhere(mask)}

    assert names(split_pos=True) == set(truth.edge_names())
    assert names() == {"embed->m0", "embed->a0.1.q", "embed->a1.0.k", "m0->a1.0.v", "direct->a1.0.v"}
    assert names(direct_edges=False) == names() - {"direct->a1.0.v"}
    joint = {"embed->m0", "embed->a0.1.qkv", "embed->a1.0.qkv", "m0->a1.0.qkv", "direct->a1.0.qkv"}
    assert names(split_qkv=False) == joint
    plain = toy_truth(["embed->m0"], Graph(config()))
    with pytest.raises(PahqError, match="search with split_pos off"):
        plain.on(Graph(config(), split_pos=True))
    with pytest.raises(PahqError, match="n_layers=2, but bigger has 3"):
        plain.on(Graph(config(n_layers=3, name="bigger")))
    with pytest.raises(PahqError, match="d_mlp=8, but bare has 0"):
        plain.on(Graph(config(d_mlp=0, name="bare")))


def test_joint_receivers_of_grouped_queries() -> None:
    graph = Graph(config(n_kv_heads=2))
    mask = mask_of(graph, ["a0.0->a1.3.q", "embed->a1.0.k"])
    joint = Graph(config(n_kv_heads=2), split_qkv=False)
    expected = mask_of(joint, ["a0.0->a1.1.qkv", "embed->a1.0.qkv"])
    np.testing.assert_array_equal(moved(graph, mask, joint), expected)


def test_masks_must_fit() -> None:
    graph = Graph(config())
    with pytest.raises(PahqError, match="mask: float64"):
        Truth("toy", "", graph, np.zeros(graph.shape))
    with pytest.raises(PahqError, match="which is no edge"):
        Truth("toy", "", graph, np.ones(graph.shape, dtype=bool))
    with pytest.raises(PahqError, match=r"other: bool \[2\]"):
        Truth("toy", "", graph, np.zeros(graph.shape, dtype=bool), published={"other": np.zeros(2, dtype=bool)})
    with pytest.raises(PahqError, match="edge 'm1->m0' does not exist"):
        mask_of(graph, ["m1->m0"])


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    graph = Graph(config(), split_pos=True)
    other = mask_of(graph, ["embed->m1"])
    truth = Truth(
        "mine",
        "my own",
        graph,
        mask_of(graph, ["pos_embed->m0", "m0->logits"]),
        "l2:0",
        "zero",
        7,
        3,
        published={"other": other},
        facts={"kind": "made up"},
    )
    truth.save(tmp_path / "truth.json")
    again = load_truth(str(tmp_path / "truth.json"))
    assert again.to_json() == truth.to_json()
    np.testing.assert_array_equal(again.mask, truth.mask)
    np.testing.assert_array_equal(again.published["other"], other)


def test_a_circuit_can_be_the_truth(tmp_path: Path) -> None:
    graph = Graph(config())
    mask = mask_of(graph, ["embed->m0", "m0->logits", "direct->a0.0.q"])
    effects = np.where(mask, 1.0, np.nan)
    Circuit(graph, mask, effects, np.full(graph.shape, -1)).save(tmp_path)
    np.testing.assert_array_equal(load_truth(str(tmp_path / "circuit.json")).mask, mask)


def test_a_bare_list_of_edges(tmp_path: Path) -> None:
    path = tmp_path / "edges.json"
    path.write_text('{"edges": ["embed -> m0", {"sender": "m0", "receiver": "logits"}]}')
    graph = Graph(config())
    assert read_truth(path, graph).edge_names() == ["embed->m0", "m0->logits"]
    with pytest.raises(PahqError, match="which model its edges are about"):
        read_truth(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not an object"),
        ("{}", "no list 'edges'"),
        ('{"edges": [5]}', "5 is no edge"),
        ('{"edges": ["m1->m0"]}', "edge 'm1->m0' does not exist"),
        ('{"edges": [], "n": "six"}', "n is 'six'; give a value of type int"),
        ('{"edges": [], "published": []}', "must be objects"),
        ('{"edges": [], "architecture": {"n_layers": 1}}', "architecture or graph cannot be read"),
        ('{"edges": [', "not valid JSON"),
    ],
)
def test_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "truth.json"
    path.write_text(text)
    with pytest.raises(PahqError, match=message) as caught:
        read_truth(path, Graph(config()))
    assert "\n" not in str(caught.value)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(PahqError, match="did you mean 'ioi-gpt2'"):
        load_truth("ioi-gpt")
    with pytest.raises(PahqError, match="choose one of ioi-gpt2, "):
        load_truth("nothing")
    with pytest.raises(PahqError, match="no such file"):
        load_truth(str(tmp_path / "none.json"))


def test_command_lists(pahq: commands.Pahq) -> None:
    out = pahq("truth").out
    assert all(any(line.startswith(f"{name} ") for line in out.splitlines()) for name in COUNTS)
    assert json.loads(pahq("truth", "--json").out) == truth_names()


def test_command_shows(pahq: commands.Pahq) -> None:
    out = pahq("truth", "docstring-attn-only-4l").out
    assert "edges: 37 of 1,377 (24 of 1,281 addition, 13 of 96 direct)" in out
    assert "a1.4.v <- embed a0.5 direct" in out.splitlines()
    facts = json.loads(pahq("truth", "ioi-gpt2", "--json").out)
    assert len(facts["edges"]) == 1041
    assert facts["architecture"] == GPT2_SMALL.to_dict()
    assert "truth 'nothing' is unknown" in pahq("truth", "nothing").error


def test_edges_need_no_torch() -> None:
    code = "import sys; from pahq.evaluation.truth import load_truth as t; t('ioi-gpt2'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_geometry() -> None:
    assert Graph(ATTN_ONLY_4L).n_edges == 1377
    assert Graph(GPT2_SMALL).n_edges == 32923
