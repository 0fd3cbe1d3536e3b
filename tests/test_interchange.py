"""Circuits and prompts in the formats of others: round trips lose nothing a format can hold; the rest is said."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import golden
import toys
from commands import Pahq
from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.graph import Graph
from pahq.model import ModelConfig
from pahq.report.interchange import FORMATS, convert, read_circuit, write_circuit
from pahq.report.interchange.links import fold, unfold


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 2))
    learned = draw(st.booleans())
    config = ModelConfig(
        n_layers=draw(st.integers(1, 3)),
        n_heads=heads,
        n_kv_heads=groups,
        d_model=12,
        d_head=2,
        d_mlp=draw(st.sampled_from((0, 5))),
        d_vocab=10,
        d_vocab_out=10,
        n_ctx=8,
        positions="learned" if learned else "none",
        parallel=draw(st.booleans()),
        name="drawn",
    )
    split_pos = learned and draw(st.booleans())
    return Graph(config, draw(st.booleans()), draw(st.booleans()), split_pos)


def drawn_circuit(graph: Graph, seed: int) -> Circuit:
    """Kept or not, tested or not, at random; effects with all their digits."""
    draw = np.random.default_rng(seed)
    tested = graph.edges & (draw.random(graph.shape) < 0.7)
    mask = graph.edges & (draw.random(graph.shape) < 0.4)
    order = np.where(tested, draw.permutation(mask.size).reshape(graph.shape), -1)
    effects = np.where(tested, draw.standard_normal(graph.shape) * 10.0 ** draw.integers(-9, 9), np.nan)
    return Circuit(graph, mask, effects, order)


circuits = st.builds(drawn_circuit, graphs(), st.integers(0, 2**32))


def same(one: Circuit, other: Circuit, *names: str) -> None:
    for name in names:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)


@settings(max_examples=60, deadline=None)
@given(circuits)
def test_links_by_head_come_together_again(circuit: Circuit) -> None:
    found = fold(unfold(circuit), circuit.graph, "links")
    same(found.circuit, circuit, "mask", "effects", "order")
    assert found.lost == ()
    for link in unfold(circuit):
        kind = link.receiver.rpartition(".")[2]
        assert kind in ("q", "k", "v", "logits") or link.receiver.startswith("m")


@settings(max_examples=60, deadline=None)
@given(circuits)
def test_acdc_edges_hold_all_of_a_circuit(tmp_path_factory: pytest.TempPathFactory, circuit: Circuit) -> None:
    path = tmp_path_factory.mktemp("acdc") / "edges.json"
    lost = write_circuit(circuit, path, "acdc")
    back = read_circuit(path, graph=circuit.graph)
    same(back.circuit, circuit, "mask", "effects", "order")
    assert back.lost == ()
    graph = circuit.graph
    assert any("q/k/v" in line for line in lost) == (not graph.split_qkv)
    assert any("groups" in line for line in lost) == (graph.config.group_size > 1)
    assert any("direct edges" in line for line in lost) == (not graph.direct_edges)
    if graph.split_qkv and graph.config.group_size == 1 and graph.config.d_mlp:
        found = read_circuit(path).circuit  # all edges are there: they tell the model
        assert (found.graph.config.n_layers, found.graph.config.parallel) == (
            graph.config.n_layers,
            graph.config.parallel,
        )
        assert found.graph.options() == graph.options()
        same(found, circuit, "mask", "effects", "order")


@pytest.mark.parametrize("format", ["eap-ig", "eap-ig-pt"])
@settings(max_examples=40, deadline=None)
@given(circuit=circuits)
def test_eap_ig_graphs_hold_masks_and_scores(
    tmp_path_factory: pytest.TempPathFactory, format: str, circuit: Circuit
) -> None:
    path = tmp_path_factory.mktemp("eap") / ("g.json" if format == "eap-ig" else "g.pt")
    lost = write_circuit(circuit, path, format)
    graph = circuit.graph
    plain = Graph(graph.config, graph.split_qkv, direct_edges=False)
    want = fold(unfold(circuit), plain, "own").circuit
    back = read_circuit(path, graph=plain).circuit
    np.testing.assert_array_equal(back.mask, want.mask)
    np.testing.assert_array_equal(
        back.effects[plain.edges], np.where(np.isnan(want.effects), 0.0, want.effects)[plain.edges]
    )
    assert any("direct edges" in line for line in lost) == graph.direct_edges
    assert any("order" in line for line in lost) == bool(circuit.n_tested)
    assert any("position" in line for line in lost) == graph.split_pos


def eap_ig_graph(seed: int, parallel: bool) -> dict[str, Any]:
    """Made as EAP-IG makes it: receivers by layer, senders before them."""
    draw = np.random.default_rng(seed)
    senders, edges = ["input"], []
    for layer in range(2):
        heads = [f"a{layer}.h{head}" for head in range(2)]
        edges += [(sender, f"{head}<{kind}>") for sender in senders for head in heads for kind in "qkv"]
        before = senders if parallel else senders + heads
        edges += [(sender, f"m{layer}") for sender in before]
        senders = [*senders, *heads, f"m{layer}"]
    edges += [(sender, "logits") for sender in senders]
    kept = {edge: bool(draw.random() < 0.5) for edge in edges}
    nodes = {}
    for node in [*senders, "logits"]:
        out = node == "logits" or any(kept[e] for e in edges if e[0] == node)
        into = node in ("input", "logits") or any(kept[e] for e in edges if e[1].partition("<")[0] == node)
        nodes[node] = {"in_graph": out and into}
    return {
        "cfg": {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": parallel, "d_model": 16},
        "nodes": nodes,
        "edges": {f"{a}->{b}": {"score": float(draw.standard_normal()), "in_graph": kept[a, b]} for a, b in edges},
    }


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_graphs_of_eap_ig_pass_through_unchanged(
    tmp_path_factory: pytest.TempPathFactory, seed: int, parallel: bool
) -> None:
    folder = tmp_path_factory.mktemp("through")
    facts = eap_ig_graph(seed, parallel)
    (folder / "in.json").write_text(json.dumps(facts))
    read = convert(folder / "in.json", folder / "circuit").lost
    assert len(read) == 1
    assert "name the model" in read[0]
    assert convert(folder / "circuit", folder / "out.json", write_as="eap-ig").lost == ()
    assert json.loads((folder / "out.json").read_text()) == facts
    convert(folder / "out.json", folder / "out.pt")
    convert(folder / "out.pt", folder / "again.json", write_as="eap-ig")
    assert json.loads((folder / "again.json").read_text()) == facts


def test_tensors_are_laid_out_as_eap_ig_has_them(tmp_path: Path) -> None:
    graph = toys.graph()
    circuit = toys.circuit(graph, toys.mask(graph, "a0.1->m1", "embed->a1.0.v"), np.where(graph.edges, 0.5, np.nan))
    write_circuit(circuit, tmp_path / "i.pt", "eap-ig-pt")
    facts = torch.load(tmp_path / "i.pt", weights_only=True)
    assert facts["cfg"] == {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}
    forward, backward = 1 + 2 * 3, 2 * 7 + 1
    assert facts["edges_scores"].shape == facts["edges_in_graph"].shape == (forward, backward)
    assert facts["edges_in_graph"].nonzero().tolist() == [[0, 7 + 2 * 2], [2, 13]]
    assert facts["dst_nodes"][:7] == ["a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "m0"]


def test_what_mib_files_hold_beyond_edges_is_said(tmp_path: Path) -> None:
    facts = eap_ig_graph(0, False)
    facts["nodes"]["m0"] |= {"score": 0.5, "neurons": [True], "neurons_scores": [0.1]}
    facts["nodes"]["m1"]["in_graph"] = not facts["nodes"]["m1"]["in_graph"]
    facts["cfg"]["seed"] = 1
    del facts["edges"]["m0->m1"], facts["edges"]["input->m0"]["score"]
    (tmp_path / "i.json").write_text(json.dumps(facts))
    reading = read_circuit(tmp_path / "i.json")
    for part in ("scores of nodes", "neurons and their scores", "in_graph of ", "of cfg: seed", "about 1 edges"):
        assert any(part in line for line in reading.lost), (part, reading.lost)
    graph = reading.circuit.graph
    assert math.isnan(reading.circuit.effects[graph.edge("embed->m0")])
    assert not reading.circuit.mask[graph.edge("m0->m1")]


@pytest.mark.parametrize("case", [name for name in golden.case_names() if not name.startswith("tracr")])
def test_recorded_acdc_runs_pass_through_unchanged(case: str, tmp_path: Path) -> None:
    source = golden.folder() / case / "edges.json"
    records = json.loads(source.read_text())
    assert all("name the model" in line for line in convert(source, tmp_path / "c").lost)
    kept = sum(record["present"] and record["edge_type"] != "PLACEHOLDER" for record in records)
    assert Circuit.load(tmp_path / "c").n_edges == kept
    convert(tmp_path / "c", tmp_path / "edges.json", write_as="acdc")
    assert json.loads((tmp_path / "edges.json").read_text()) == records


@pytest.mark.parametrize("case", golden.case_names())
def test_recorded_decisions_give_the_recorded_circuit(case: str, tmp_path: Path) -> None:
    recorded = golden.load(case)
    found = read_circuit(golden.folder() / case / "evals.jsonl", graph=recorded.graph).circuit
    places = set(map(tuple, np.argwhere(found.mask)))
    assert places == recorded.kept
    if case.startswith("tracr"):
        told = read_circuit(golden.folder() / case / "config.json").circuit
        assert set(map(tuple, np.argwhere(told.mask))) == recorded.kept


def as_log(records: list[dict[str, Any]], colon: str) -> str:
    """What ACDC prints of these decisions."""

    def node(record: dict[str, Any], end: str) -> str:
        index = ", ".join(colon if part is None else str(part) for part in record[f"{end}_index"])
        return f"TLACDCInterpNode({record[end]}, [{index}])"

    lines = ["New metric: 0.0"]
    for record in records:
        word = "keeping" if record["kept"] else "removing"
        lines += [
            "",
            f"Node: cur_parent={node(record, 'parent')} (self.current_node={node(record, 'child')})",
            "",
            f"Metric after removing connection to {record['parent']} {record['parent_index']} is "
            f"{record['metric_after']} (and current metric {record['metric_before']})",
            f"Result is {record['effect']}...so {word} connection",
        ]
    return "\n".join(lines)


@pytest.mark.parametrize("colon", [":", "'COL'", "None"])
def test_logs_give_what_was_decided(tmp_path: Path, colon: str) -> None:
    case = golden.load("b_mlp3l4h_LN")
    records = [json.loads(line) for line in (golden.folder() / case.name / "evals.jsonl").read_text().splitlines()]
    (tmp_path / "run.log").write_text(as_log(records, colon))
    found = read_circuit(tmp_path / "run.log", graph=case.graph).circuit
    assert set(map(tuple, np.argwhere(found.mask))) == case.kept
    assert found.n_tested == len(records)
    for record in case.evals:
        assert found.effects[record.row, record.column] == record.effect
    with pytest.raises(PahqError, match=r"88 edges, which are not all of a model's.*--model"):
        read_circuit(tmp_path / "run.log")


def test_lists_of_kept_edges(tmp_path: Path) -> None:
    graph = toys.graph()
    ends = [
        ["blocks.1.hook_resid_post", [None], "blocks.1.attn.hook_result", [None, None, 1]],
        ["blocks.1.attn.hook_q", [None, None, 1], "blocks.1.hook_q_input", [None, None, 1]],
        ["blocks.1.hook_q_input", [None, None, 1], "blocks.0.hook_resid_pre", [None]],
        ["blocks.1.attn.hook_result", [None, None, 1], "blocks.1.attn.hook_q", [None, None, 1]],
    ]
    want = toys.mask(graph, "a1.1->logits", "direct->a1.1.q", "embed->a1.1.q")
    (tmp_path / "plain.json").write_text(json.dumps(ends))
    np.testing.assert_array_equal(read_circuit(tmp_path / "plain.json", graph=graph).circuit.mask, want)
    (tmp_path / "pairs.json").write_text(json.dumps([[end, 0.25] for end in ends]))
    found = read_circuit(tmp_path / "pairs.json", graph=graph).circuit
    np.testing.assert_array_equal(found.mask, want)
    assert (found.effects[want] == 0.25).all()
    with pytest.raises(PahqError, match=r"ends in blocks\.1\.hook_resid_post, but toy ends in blocks\.2"):
        read_circuit(tmp_path / "plain.json", graph=toys.graph(layers=3))


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "edges.pkl").write_bytes(pickle.dumps([(("a",), 0.5)]))
    with pytest.raises(PahqError, match="is a pickle, which could run anything"):
        convert(tmp_path / "edges.pkl", tmp_path / "out")
    torch.save({"cfg": Path("x")}, tmp_path / "i.pt")
    with pytest.raises(PahqError, match="refuses it"):
        convert(tmp_path / "i.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_and_truths_are_read_without_their_tensors(tmp_path: Path) -> None:
    circuit = drawn_circuit(toys.graph(), 3)
    circuit.save(tmp_path / "run")
    (tmp_path / "alone.json").write_bytes((tmp_path / "run" / "circuit.json").read_bytes())
    reading = read_circuit(tmp_path / "alone.json")
    np.testing.assert_array_equal(reading.circuit.mask, circuit.mask)
    np.testing.assert_array_equal(reading.circuit.effects[circuit.mask], circuit.effects[circuit.mask])
    assert "circuit.safetensors is not beside it" in reading.lost[0]
    whole = read_circuit(tmp_path / "run" / "circuit.json").circuit
    same(whole, circuit, "mask", "effects", "order")


PAIRS = [
    {"clean": "a «b»", "corrupt": "c d", "answers": [" x", " y"], "wrong_answers": [" z"]},
    {"clean": "e\u2028f", "corrupt": "g h", "answers": [5], "wrong_answers": []},
]


def test_prompts_pass_through_autocircuits_format(tmp_path: Path, pahq: Pahq) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    there = pahq("convert", tmp_path / "in.jsonl", tmp_path / "auto.json")
    assert "token ids in 1 prompts" in there.err
    assert json.loads((tmp_path / "auto.json").read_text()) == {"prompts": PAIRS}
    back = pahq("convert", tmp_path / "auto.json", tmp_path / "out.jsonl")
    assert (back.code, back.err) == (0, "")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n") if line] == PAIRS


def test_what_prompt_files_hold_besides_is_said(tmp_path: Path) -> None:
    facts = {"seq_labels": ["a"], "prompts": [PAIRS[0] | {"topic": "x"}]}
    (tmp_path / "in.json").write_text(json.dumps(facts))
    lost = convert(tmp_path / "in.json", tmp_path / "out.jsonl").lost
    assert [line.partition(": ")[2] for line in lost] == ["beside the prompts: seq_labels", "of each prompt: topic"]
    (tmp_path / "in.csv").write_text("clean,corrupted,label,note\nthe year 1717 to 17,the year 1701 to 17,17,n\n")
    done = convert(tmp_path / "in.csv", tmp_path / "years.json")
    (pair,) = json.loads((tmp_path / "years.json").read_text())["prompts"]
    assert (pair["answers"][0], pair["answers"][-1], pair["wrong_answers"][-1]) == ("18", "99", "17")
    assert len(pair["answers"]) + len(pair["wrong_answers"]) == 100
    assert any("note" in line for line in done.lost)
    assert any("labels" in line for line in done.lost)
    assert convert(tmp_path / "in.csv", tmp_path / "years.jsonl").lost == (
        f"{tmp_path / 'in.csv'}: of each prompt: note",
    )
    assert json.loads((tmp_path / "years.jsonl").read_text())["label"] == "17"


def grouped(groups: int) -> Circuit:
    """A circuit with edges into keys and values, in a model of four heads a layer."""
    config = ModelConfig(
        n_layers=2, n_heads=4, n_kv_heads=groups, d_model=8, d_head=2, d_mlp=4, d_vocab=5, d_vocab_out=5, n_ctx=8,
        name="g",
    )  # fmt: skip
    return drawn_circuit(Graph(config), 5)


@pytest.mark.parametrize("format", ["eap-ig", "acdc"])
@pytest.mark.parametrize("groups", [1, 2])
def test_groups_that_a_format_cannot_tell_are_said(tmp_path: Path, pahq: Pahq, format: str, groups: int) -> None:
    circuit = grouped(groups)
    circuit.save(tmp_path / "own")
    file = tmp_path / "file.json"
    told = pahq("convert", tmp_path / "own", file, "--to", format).err.splitlines()
    written = [line for line in told if "groups of keys and values" in line]
    kept = circuit.n_addition if format == "eap-ig" else circuit.n_edges
    anew = pahq("convert", file, tmp_path / "heads")
    heads = Circuit.load(tmp_path / "heads")
    read = [line for line in anew.err.splitlines() if "the same keys and values" in line]
    assert len(written) == len(read) == 1
    assert f"{kept:,} edges are {heads.n_edges:,} there (to read them back as they were: --like RUN)" in written[0]
    assert f"each {4 // groups} heads have" in read[0]
    assert f"the {kept:,} edges with groups are {heads.n_edges:,} by head" in read[0]
    like = pahq("convert", file, tmp_path / "like", "--like", tmp_path / "own")
    assert "the same keys and values" not in like.err
    assert Circuit.load(tmp_path / "like").n_edges == kept


def test_heads_with_keys_of_their_own_are_no_groups(tmp_path: Path, pahq: Pahq) -> None:
    grouped(4).save(tmp_path / "own")
    assert "group" not in pahq("convert", tmp_path / "own", tmp_path / "file.json", "--to", "eap-ig").err
    assert "group" not in pahq("convert", tmp_path / "file.json", tmp_path / "heads").err


def test_the_command(tmp_path: Path, pahq: Pahq) -> None:
    circuit = drawn_circuit(toys.graph(groups=1), 1)
    circuit.save(tmp_path / "run")
    done = pahq("convert", tmp_path / "run", tmp_path / "g.json", "--to", "eap-ig", "--json")
    assert done.code == 0
    facts = json.loads(done.out)
    assert (facts["read_as"], facts["written_as"], facts["count"]) == ("pahq", "eap-ig", circuit.n_edges)
    assert [f"not kept: {line}" for line in facts["lost"]] == done.err.splitlines()
    assert any("groups of keys and values" in line for line in facts["lost"])
    like = pahq("convert", tmp_path / "g.json", tmp_path / "back", "--like", tmp_path / "run", "--quiet")
    assert (like.code, like.out) == (0, "")
    back = Circuit.load(tmp_path / "back")
    direct = circuit.graph.direct
    np.testing.assert_array_equal(back.mask[:, :direct], circuit.mask[:, :direct])
    again = pahq("convert", tmp_path / "g.json", tmp_path / "back")
    assert again.error == f"{tmp_path / 'back'}: is there already; choose another path, or replace it with --force"
    assert pahq("convert", tmp_path / "g.json", tmp_path / "back", "--force").code == 0
    for name in FORMATS:
        assert name in pahq("convert", "--help").out


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("{}", (), "its content is of none of the known formats"),
        ("not json", (), "its content is of none of the known formats"),
        ("[" * 100_000, (), "JSON nested too deeply"),
        ("{}", ("--format", "eap"), "format 'eap' is unknown; known: pahq, eap-ig"),
        ("{}", ("--format", "acdc"), "no list of ACDC's edges"),
        ("{}", ("--format", "eap-ig"), "no EAP-IG graph"),
        ('{"cfg": {}, "edges": {}}', (), "cfg has n_layers None"),
        ('{"cfg": {"n_layers": 1, "n_heads": 1}, "edges": {"x": {"in_graph": true}}}', (), "'x' is no edge"),
        ('{"cfg": {"n_layers": 1, "n_heads": 1}, "edges": {"m0->logits": {"in_graph": 1}}}', (), "has in_graph 1"),
        (
            '{"cfg": {"n_layers": 1, "n_heads": 1}, "edges": {"m0->logits": {"in_graph": true, "score": "a"}}}',
            (),
            "has score 'a'",
        ),
        (
            '{"cfg": {"n_layers": 1, "n_heads": 1}, "edges": {"m1->logits": {"in_graph": true}}}',
            (),
            "there is no edge m1->logits in in",
        ),
        ('{"prompts": []}', (), "holds prompts, but 'pahq' is a format of a circuit"),
        ('[["a", [0], "b", [0]]]', (), "'a' [0] is no node of ACDC's graph"),
    ],
)
def test_bad_files_are_named_in_one_line(
    tmp_path: Path, pahq: Pahq, content: str, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "in.json").write_text(content)
    assert message in pahq("convert", tmp_path / "in.json", tmp_path / "out", *words).error
    assert not (tmp_path / "out").exists()


def test_targets_that_do_not_tell_their_format(tmp_path: Path, pahq: Pahq) -> None:
    drawn_circuit(toys.graph(), 1).save(tmp_path / "run")
    assert "'.json' does not tell its format; say --to" in pahq("convert", tmp_path / "run", tmp_path / "x.json").error
    assert "/absent" in pahq("convert", "/absent", tmp_path / "x").error
    both = pahq("convert", tmp_path / "run", tmp_path / "x", "--like", "a", "--model", "b")
    assert "exclude each other" in both.error
