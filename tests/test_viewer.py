"""What the viewer's page is told: nodes, edges, patterns, words; and that nothing in it can be anything but text."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import commands
import pahq as package
import random_models
import toys
from commands import Pahq
from pahq.engine.reference import run
from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.graph import Graph
from pahq.model import Transformer
from pahq.report.viewer import drawing as drawn
from pahq.report.viewer import evidence as shown
from pahq.report.viewer.drawing import KEPT, REMOVED, UNTESTED, Overlay, drawing, kept_nodes
from pahq.report.viewer.evidence import evidence, through_norm
from pahq.report.viewer.page import escaped, page, read_page
from pahq.task.prompts import Prompts, last_position
from pahq.viewing import VIEWER_FILE
from scored_runs import config
from tiny import RandomTask, transformer

NASTY = '</script><img src=x onerror="document.title=1"><!-- & \u2028\u2029 ]]> <script>'
SOURCES = Path(__file__).parent.parent / "viewer"


def swept(graph: Graph, seed: int = 0) -> Circuit:
    """Random effects; those above 0.5 are kept, one edge in eight was never tested."""
    draw = np.random.default_rng(seed)
    effects = np.where(graph.edges & (draw.random(graph.shape) > 1 / 8), draw.normal(size=graph.shape), np.nan)
    order = np.where(np.isfinite(effects), draw.permutation(effects.size).reshape(graph.shape), -1)
    return Circuit(graph, np.nan_to_num(effects, nan=-1.0) > 0.5, effects, order)


# ---- nodes and edges


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("split", [True, False])
def test_every_edge_is_told_once_with_its_facts(groups: int, split: bool) -> None:
    graph = toys.graph(3, heads=4, groups=groups, split_qkv=split)
    circuit, other = swept(graph), swept(graph, 1).mask
    data = drawing(circuit, overlay=Overlay("other", other))
    ids = [node["id"] for node in data["nodes"]]
    assert len(set(ids)) == len(ids)
    told = {}
    for source, target, *facts in data["edges"]:
        told[ids[source], ids[target], facts[0]] = facts[1:]
    for target, *facts in data["direct"]:
        told["direct", ids[target], facts[0]] = facts[1:]
    assert len(told) == len(data["edges"]) + len(data["direct"])
    for row, column in np.argwhere(graph.edges).tolist():
        receiver = graph.receivers[row]
        name = receiver.name.rpartition(".")[0] if receiver.is_attention else receiver.name
        if groups == 2 and receiver.kind in ("k", "v", "qkv"):
            name += ".kv"
        facts = told.pop((graph.sender_name(column), name, receiver.kind), None)
        effect, kept = circuit.effects[row, column], circuit.mask[row, column]
        if not (kept or other[row, column] or np.isfinite(effect)):
            assert facts is None
            continue
        assert facts is not None
        assert facts[0] == (pytest.approx(effect, rel=1e-5) if np.isfinite(effect) else None)
        assert facts[1] == circuit.order[row, column]
        assert facts[2] == (KEPT if kept else REMOVED if np.isfinite(effect) else UNTESTED)
        assert facts[3] == other[row, column]
    assert not told
    assert data["overlay"] == {"name": "other", "edges": int(other.sum())}
    assert set(data["omitted"].values()) == {0}
    assert len(data["links"]) == (12 if groups == 2 else 0)


def test_what_is_drawn_is_bounded_and_the_rest_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = toys.graph(4, heads=4)
    circuit, other = swept(graph), swept(graph, 1).mask
    addition = graph.edges.copy()
    addition[:, graph.direct] = False
    kept, missed = int((circuit.mask & addition).sum()), int((other & ~circuit.mask & addition).sum())
    monkeypatch.setattr(drawn, "MAX_EDGES", kept + missed + 5)
    data = drawing(circuit, overlay=Overlay("other", other))
    assert len(data["edges"]) == kept + missed + 5
    rest = np.sort(circuit.effects[addition & ~other & ~circuit.mask & np.isfinite(circuit.effects)])[::-1]
    least = sorted((e[3] for e in data["edges"] if e[5] == REMOVED and not e[6]), reverse=True)
    assert least == pytest.approx(rest[:5].tolist(), rel=1e-5)
    assert data["omitted"] == {"kept": 0, "missed": 0, "shared": 0, "tested": len(rest) - 5}
    monkeypatch.setattr(drawn, "MAX_EDGES", 7)
    data = drawing(circuit, overlay=Overlay("other", other))
    best = np.sort(circuit.effects[circuit.mask & addition])[::-1][:7]
    assert sorted((e[3] for e in data["edges"]), reverse=True) == pytest.approx(best.tolist(), rel=1e-5)
    assert data["omitted"]["kept"] + data["omitted"]["shared"] == kept - 7
    assert data["omitted"]["missed"] == missed


def test_size_decides_where_effects_count_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = toys.graph(2)
    effects = np.where(graph.edges, 0.1, np.nan)
    for name, value in (("embed->m0", -9.0), ("embed->m1", 5.0)):
        effects[graph.edge(name)] = value
    circuit = Circuit(graph, np.zeros(graph.shape, dtype=bool), effects, np.full(graph.shape, -1))
    monkeypatch.setattr(drawn, "MAX_EDGES", 1)
    assert [edge[3] for edge in drawing(circuit, absolute=True)["edges"]] == [-9.0]
    assert [edge[3] for edge in drawing(circuit)["edges"]] == [5.0]


# ---- patterns and words


def pair(model: Transformer, n: int = 2, tokens: int = 5) -> Prompts:
    draw = torch.Generator().manual_seed(3)
    clean, corrupt = (torch.randint(0, model.config.d_vocab, (n, tokens), generator=draw) for _ in range(2))
    return last_position(clean, corrupt, [[1]] * n, [[2]] * n)


@random_models.drawn(25)
@given(random_models.models())
def test_shares_of_all_nodes_sum_to_the_logits(model: Transformer) -> None:
    """The frozen norm is linear: senders' shares, attention's output biases and the norm's bias make up its output."""
    prompts, graph = pair(model), Graph(model.config)
    one = run(model, prompts.clean)
    rows, where = torch.arange(2), torch.full((2,), 4)
    parts = [shown._written(model, one, sender, rows, where) for sender in graph.senders]
    parts += [b.attn.b_O.expand(2, -1) for b in model.blocks if b.attn.b_O is not None]
    total = through_norm(model, torch.stack(parts), one.final[rows, where]).sum(0)
    if model.ln_final.b is not None:
        total = total + model.ln_final.b
    torch.testing.assert_close(total, model.unembed_input(one.final[rows, where]))


@random_models.drawn(15)
@given(random_models.models(), st.booleans())
def test_patterns_are_attention_and_words_its_best_logits(model: Transformer, padded: bool) -> None:
    prompts, graph = pair(model), Graph(model.config)
    if padded and model.config.causal:
        pad = torch.zeros(2, 5, dtype=torch.bool)
        pad[1, 4:] = True
        read = torch.tensor([[4], [3]])
        prompts = Prompts(**{**vars(prompts), "pad": pad, "read": read})
    nodes = {sender.name: 1.0 for sender in graph.senders}
    data = evidence(model, prompts, graph, nodes)
    head = graph.senders[-2 if model.config.d_mlp else -1]
    for example, (start, stop) in enumerate([(0, 5), (0, 4 if prompts.pad is not None else 5)]):
        for side, tokens in (("clean", prompts.clean), ("corrupt", prompts.corrupt)):
            one = run(model, tokens)
            assert data["examples"][example][side] == [f"#{t}" for t in tokens[example, start:stop].tolist()]
            weights = model.attention(one.q[head.layer], one.k[head.layer])[example, head.index]
            found = list(base64.b64decode(data["patterns"][head.name][example][side]))
            cells = [
                weights[query, key].item()
                for query in range(stop)
                for key in range(query + 1 if model.config.causal else stop)
            ]
            assert found == [round(255 * cell) for cell in np.array(cells, dtype=np.float32).tolist()]
            at = int(prompts.read[example, 0])
            assert data["examples"][example]["read"] == at
            write = one.z[head.layer][example, head.index, at] @ model.blocks[head.layer].attn.W_O[head.index]
            logits = through_norm(model, write, one.final[example, at]) @ model.W_U
            logits = (logits - logits.mean()).float()
            words = data["words"][head.name][example][side]
            best = logits.sort(descending=True).values
            assert [value for _, value in words["up"]] == pytest.approx(best[: shown.UP].tolist(), rel=1e-3, abs=1e-6)
            assert [value for _, value in words["down"]] == pytest.approx(
                best.flip(0)[: shown.DOWN].tolist(), rel=1e-3, abs=1e-6
            )
            word, value = words["up"][0]
            assert logits[int(word[1:])].item() == pytest.approx(value, rel=1e-3, abs=1e-6)


def test_patterns_and_words_keep_to_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer(layers=2, heads=4)
    prompts, graph = pair(model, n=5, tokens=8), Graph(model.config)
    nodes = {sender.name: float(at) for at, sender in enumerate(graph.senders)}
    cells = 2 * 8 * 36  # clean and corrupted, heads, half of the pairs of 8 tokens
    monkeypatch.setattr(shown, "PATTERN_BYTES", 2 * cells)
    data = evidence(model, prompts, graph, nodes)
    assert len(data["examples"]) == 2
    assert len(data["patterns"]) == 8
    monkeypatch.setattr(shown, "PATTERN_BYTES", cells // 4)
    data = evidence(model, prompts, graph, nodes)
    assert len(data["examples"]) == 1
    assert set(data["patterns"]) == {"a1.3", "a1.2"}  # those that matter most
    assert any("2 most relevant heads only, of 8" in note for note in data["notes"])
    monkeypatch.setattr(shown, "FLOPS", 0)
    monkeypatch.setattr(shown, "LEAST", 3)
    assert set(evidence(model, prompts, graph, nodes)["words"]) == {"m1", "a1.3", "a1.2", "logits"}
    monkeypatch.setattr(shown, "TOKENS", 3)
    data = evidence(model, prompts, graph, nodes)
    assert data["examples"][0]["clean"] == [f"#{t}" for t in prompts.clean[0, 5:].tolist()]
    assert data["examples"][0]["read"] == 2
    assert len(base64.b64decode(data["patterns"]["a1.3"][0]["clean"])) == 6


# ---- the page


class Elements(HTMLParser):
    """Every element and comment of a page, and the text of its data."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.data, self._in_data = "", False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._in_data = ("id", "data") in attrs

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data


def elements(content: bytes) -> Elements:
    parser = Elements()
    parser.feed(content.decode())
    parser.close()
    return parser


@random_models.drawn(60)
@given(st.recursive(st.text() | st.just(NASTY), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_data_comes_back_as_it_was_and_makes_no_element(value: Any) -> None:
    text = escaped({"value": value})
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == {"value": value}


def test_page_has_the_same_elements_whatever_its_data() -> None:
    plain, nasty = elements(page({"run": "x"})), elements(page({"run": NASTY, NASTY: [NASTY]}))
    assert nasty.tags == plain.tags
    assert json.loads(nasty.data)["run"] == NASTY
    assert "img" not in nasty.tags


def test_numbers_that_are_not_finite_and_lone_surrogates_are_written_as_json_can() -> None:
    data = json.loads(elements(page({"a": [float("nan"), float("inf")], "b": "\udc80"})).data)
    assert data["a"] == [None, None]
    assert data["b"] == "\udc80"


def test_page_asks_for_nothing_from_outside() -> None:
    content = page({}).decode()
    assert "default-src 'none'" in content
    assert not [word for word in ('<link rel="stylesheet', "<script src", "@import", "url(http") if word in content]
    assert "Permission is hereby granted" in content  # the library's licence goes with it


def test_committed_page_is_what_its_sources_build() -> None:
    if shutil.which("node") is None or not (SOURCES / "node_modules").is_dir():
        pytest.skip("viewer/ is not set up here (npm ci --prefix viewer)")
    done = subprocess.run(["node", "build.mjs", "--check"], cwd=SOURCES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commands.two_runs(tmp_path_factory.mktemp("runs"))


def data_of(path: Path) -> dict[str, Any]:
    data = read_page(path)
    assert data is not None
    return data


def test_every_finished_run_leaves_its_page(runs: Path) -> None:
    circuit = Circuit.load(runs / "tight")
    data = data_of(runs / "tight" / VIEWER_FILE)
    assert data["size"]["addition"] == circuit.n_addition
    assert sum(e[5] == KEPT for e in data["graph"]["edges"]) == circuit.n_addition
    assert sum(e[4] == KEPT for e in data["graph"]["direct"]) == circuit.n_direct
    assert data["threshold"] == 0.01
    assert set(data["evidence"]["patterns"]) == {n for n in kept_nodes(circuit) if n[0] == "a" and n[-2:] != "kv"}
    prompts = [json.loads(line)["clean"].split() for line in (runs / "prompts.jsonl").read_text().splitlines()]
    assert [example["clean"] for example in data["evidence"]["examples"]]
    assert all(example["clean"] in prompts for example in data["evidence"]["examples"])


def test_a_run_without_view_leaves_none(pahq: Pahq, runs: Path, tmp_path: Path) -> None:
    words = ["--model", runs / "model", "--task", runs / "prompts.jsonl", "--threshold", 0.1, "--metric", "logit_diff"]
    assert pahq("discover", *words, "-n", 3, "--out", tmp_path / "run", "--no-view", "-q").code == 0
    assert not (tmp_path / "run" / VIEWER_FILE).exists()
    answer = pahq("view", tmp_path / "run", "--json")
    assert json.loads(answer.out)["file"] == str(tmp_path / "run" / VIEWER_FILE)
    kept, again = data_of(runs / "loose" / VIEWER_FILE), data_of(tmp_path / "run" / VIEWER_FILE)
    assert again["evidence"] == kept["evidence"]
    assert again["graph"] == kept["graph"]


def test_a_page_that_cannot_be_written_fails_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pahq import viewing
    from pahq.report.progress import Watch

    def fail(*_: Any) -> None:
        raise RuntimeError("out of\nmemory")

    said: list[str] = []
    monkeypatch.setattr(viewing, "evidence", fail)
    monkeypatch.setattr(Watch, "say", lambda _, text: said.append(text))
    package.api.execute(
        config("random"), tmp_path / "run", model=transformer(layers=2), task=RandomTask(default_metric="logit_diff")
    )
    assert (tmp_path / "run" / "run.json").exists()
    assert not (tmp_path / "run" / VIEWER_FILE).exists()
    assert any("RuntimeError: out of memory" in text for text in said)


def test_overlay_of_another_run_and_of_a_truth(pahq: Pahq, runs: Path, tmp_path: Path) -> None:
    tight, loose = Circuit.load(runs / "tight"), Circuit.load(runs / "loose")
    assert "viewer-against-tight.html" in pahq("view", runs / "loose", "--against", runs / "tight").out
    for path in (runs / "loose" / "viewer-against-tight.html", tmp_path / "page.html"):
        if not path.exists():
            words = ["--truth", runs / "tight" / "circuit.json", "--out", path]
            assert pahq("view", runs / "loose", *words).code == 0
        graph = data_of(path)["graph"]
        both = [*(e[-2:] for e in graph["edges"]), *(e[-2:] for e in graph["direct"])]
        assert sum(decision == KEPT and other for decision, other in both) == int((tight.mask & loose.mask).sum())
        assert graph["overlay"]["edges"] == tight.n_edges


def test_bad_input_is_one_line_and_leaves_nothing(pahq: Pahq, runs: Path, tmp_path: Path) -> None:
    assert "there is no such folder" in pahq("view", tmp_path / "none").error
    assert "truth 'nobody' is unknown" in pahq("view", runs / "tight", "--truth", "nobody").error
    assert "give one of them" in pahq("view", runs / "tight", "--truth", "x", "--against", runs / "loose").error
    assert "a folder lies there" in pahq("view", runs / "tight", "--out", tmp_path).error
    assert "there is no folder" in pahq("view", runs / "tight", "--out", tmp_path / "no" / "page.html").error
    assert "about a model with" in pahq("view", runs / "tight", "--truth", "ioi-gpt2").error
    assert not list(tmp_path.iterdir())


def test_another_model_in_the_place_of_the_runs_is_refused(pahq: Pahq, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "tight", tmp_path / "run")
    (tmp_path / "run" / VIEWER_FILE).unlink()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["identity"]["weights"] = "others"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert "no longer those of the run" in pahq("view", tmp_path / "run").error
    assert pahq("view", tmp_path / "run", "--no-model").code == 0
    data = data_of(tmp_path / "run" / VIEWER_FILE)
    assert data["evidence"] is None
    assert "without the model" in data["missing"]


def test_runs_on_objects_are_shown_from_python(tmp_path: Path) -> None:
    model, task = transformer(layers=2), RandomTask(default_metric="logit_diff")
    package.discover(model, task, 0.05, n=3, out=tmp_path / "run", view=False)
    package.view(tmp_path / "run")
    assert "started from Python" in data_of(tmp_path / "run" / VIEWER_FILE)["missing"]
    path = package.view(tmp_path / "run", model=model, task=task)
    assert data_of(path)["evidence"]["examples"]
    path.unlink()  # else patterns and words come from there
    with pytest.raises(PahqError, match="no longer those of the run"):
        package.view(tmp_path / "run", out=tmp_path / "p.html", model=transformer(layers=2, seed=1), task=task)
