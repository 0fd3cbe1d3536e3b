"""Circuits, journals and run folders on disk: what is written reads back exactly, damage is named in one line."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from pahq.engine.reference import ABLATIONS
from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.files import read_json, write_atomic, write_json
from pahq.graph import Graph
from pahq.method.acdc import AcdcOptions, Decision, HeadOrder, SenderOrder
from pahq.precision.policy import UnderTest, get_policy
from pahq.report import journal
from pahq.report.config import CHOICES, RunConfig
from pahq.report.folder import LOCK_FILE, START_FILE, RunFolder
from pahq.report.passes import PassesFile
from pahq.report.tables import as_csv
from pahq.report.tracking.event import Event
from pahq.report.tracking.jsonl import Jsonl, read_events
from tiny import transformer

CONFIG = RunConfig("m", "t", 0.05, metric="kl_div")


def some_circuit() -> Circuit:
    graph = Graph(transformer(2, 2).config)
    draw = np.random.default_rng(0)
    mask = graph.edges & (draw.random(graph.shape) < 0.3)
    order = np.where(graph.edges, draw.permutation(mask.size).reshape(graph.shape), -1)
    effects = np.where(graph.edges, draw.standard_normal(graph.shape), np.nan)
    return Circuit(graph, mask, effects, order, {"config": {"model": "m"}})


def test_circuit_survives_disk_bit_for_bit(tmp_path: Path) -> None:
    circuit = some_circuit()
    circuit.save(tmp_path / "new" / "folder")
    loaded = Circuit.load(tmp_path / "new" / "folder")
    for name in ("mask", "effects", "order"):
        assert getattr(loaded, name).tobytes() == getattr(circuit, name).tobytes()
    assert loaded.metadata == circuit.metadata
    assert loaded.graph.config == circuit.graph.config
    assert loaded.graph.options() == circuit.graph.options()
    assert loaded.edges() == circuit.edges()


def test_circuit_lists_its_edges_in_order_of_testing() -> None:
    circuit = some_circuit()
    edges = circuit.edges()
    assert len(edges) == circuit.n_edges == circuit.n_addition + circuit.n_direct == int(circuit.mask.sum())
    assert [edge.order for edge in edges] == sorted(edge.order for edge in edges)
    for edge in edges:
        place = circuit.graph.edge(f"{edge.sender}->{edge.receiver}")
        assert circuit.mask[place]
        assert (circuit.effects[place], circuit.order[place]) == (edge.effect, edge.order)
    top = circuit.largest(5)
    assert [abs(edge.effect) for edge in top] == sorted((abs(edge.effect) for edge in edges), reverse=True)[:5]


def test_circuit_refuses_what_is_no_edge() -> None:
    circuit = some_circuit()
    stray = circuit.mask.copy()
    stray[0, circuit.graph.n_upstream(circuit.graph.receivers[0])] = True
    with pytest.raises(PahqError, match="no edge of the graph"):
        replace(circuit, mask=stray)
    with pytest.raises(PahqError, match="mask has shape"):
        replace(circuit, mask=circuit.mask[:-1])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("circuit.json", lambda data: data[: len(data) // 2], "circuit.json: not valid JSON"),
        ("circuit.json", lambda data: b"[]", "circuit.json: holds a JSON list"),
        ("circuit.json", lambda data: b"{}", "damaged or not a circuit"),
        ("circuit.json", lambda data: data.replace(b'"graph"', b'"graf"'), "KeyError: 'graph'"),
        ("circuit.json", lambda data: data.replace(b'"m0"', b'"m1"', 1), "hold different edges"),
        ("circuit.safetensors", lambda data: data[:-9], "circuit.safetensors: not a whole safetensors file"),
        ("circuit.safetensors", lambda data: b"", "circuit.safetensors: not a whole safetensors file"),
        ("circuit.safetensors", lambda data: data.replace(b'"effect"', b'"efgect"'), "no tensor 'effect'"),
    ],
)
def test_damaged_circuits_are_named(tmp_path: Path, name: str, damage: Any, message: str) -> None:
    some_circuit().save(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(PahqError, match=message):
        Circuit.load(tmp_path)


def test_missing_circuit_is_named(tmp_path: Path) -> None:
    with pytest.raises(PahqError, match=r"circuit.json: there is no such file"):
        Circuit.load(tmp_path)


def decision(order: int, checkpoint: bool = False) -> Decision:
    return Decision(order, order // 3, order % 3, 0.1 * order, math.pi**order / 7, order % 2 == 0, checkpoint)


def edge_name(row: int, column: int) -> str:
    return f"{row}->{column}"


def write_journal(path: Path, count: int = 10, checkpoints: tuple[int, ...] = (4, 7)) -> list[Decision]:
    decisions = [decision(order, order in checkpoints) for order in range(count)]
    with journal.Journal(path, edge_name) as open_journal:
        for start in range(0, count, 3):
            open_journal.append(decisions[start : start + 3], {"states": start})
    return decisions


def test_journal_reads_back_up_to_the_last_checkpoint(tmp_path: Path) -> None:
    decisions = write_journal(tmp_path / "j")
    found, spent = journal.read(tmp_path / "j")
    assert found == decisions[:8]
    assert spent == {"states": 9}


def test_journal_cut_at_every_byte_loses_only_what_follows_the_cut(tmp_path: Path) -> None:
    decisions = write_journal(tmp_path / "j")
    data = (tmp_path / "j").read_bytes()
    for at in range(len(data)):
        (tmp_path / "j").write_bytes(data[:at])
        found, _ = journal.read(tmp_path / "j")
        whole = data[:at].count(b'"order"') - (
            not data[:at].endswith(b"\n") and b'"order"' in data[:at].split(b"\n")[-1]
        )
        assert found == decisions[: 8 if whole >= 8 else 5 if whole >= 5 else 0]


@pytest.mark.parametrize("line", [b"{", b"[]", b"\0\0\0\0", b'{"order": 1}', b'{"spent": 3}'])
def test_damage_inside_a_journal_is_named(tmp_path: Path, line: bytes) -> None:
    write_journal(tmp_path / "j")
    lines = (tmp_path / "j").read_bytes().split(b"\n")
    lines[1] = line
    (tmp_path / "j").write_bytes(b"\n".join(lines))
    with pytest.raises(PahqError, match="line 2 is damaged"):
        journal.read(tmp_path / "j")


def test_a_missing_decision_is_noticed(tmp_path: Path) -> None:
    write_journal(tmp_path / "j")
    lines = (tmp_path / "j").read_bytes().split(b"\n")
    del lines[1]
    (tmp_path / "j").write_bytes(b"\n".join(lines))
    with pytest.raises(PahqError, match="line 2 is damaged"):
        journal.read(tmp_path / "j")


def test_cut_journal_can_be_appended_to(tmp_path: Path) -> None:
    decisions = write_journal(tmp_path / "j")
    found, spent = journal.read(tmp_path / "j")
    journal.cut(tmp_path / "j", found, spent, edge_name)
    with journal.Journal(tmp_path / "j", edge_name) as more:
        more.append([replace(decisions[8], checkpoint=True)], {"states": 11})
    assert journal.read(tmp_path / "j") == ([*decisions[:8], replace(decisions[8], checkpoint=True)], {"states": 11})


def test_journal_names_a_full_disk() -> None:
    with (
        pytest.raises(PahqError, match="/dev/full: no space is left"),
        journal.Journal(Path("/dev/full"), edge_name) as full,
    ):
        full.append([decision(0)], {})


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f.json"
    write_json(file, {"old": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PahqError, match=r"f\.json: no space is left"):
        write_atomic(file, b"new")
    assert json.loads(file.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["f.json"]


def test_a_file_name_that_is_no_text_can_be_written_down(tmp_path: Path) -> None:
    name = os.fsdecode(b"runs/\xff")
    write_json(tmp_path / "f.json", {"run": name})
    assert read_json(tmp_path / "f.json") == {"run": name}
    events = Jsonl(tmp_path / "events.jsonl")
    events.emit(Event("started", 0, "", {"command": name}))
    events.close(0)
    assert read_events(tmp_path / "events.jsonl")[0]["command"] == name
    assert as_csv([{"run": name}]) == b"run\nruns/\\udcff\n"


def test_a_write_that_takes_only_a_part_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr("os.write", lambda file, data: write(file, data[:3]))
    with journal.Journal(tmp_path / "journal.jsonl", edge_name) as lines:
        lines.append([decision(0)], {})
    events = Jsonl(tmp_path / "events.jsonl")
    events.emit(Event("started", 0, "", {"a": 1}))
    events.close(0)
    passes = PassesFile(tmp_path / "passes.jsonl")
    passes.of({}, 1).save(np.ones((2, 2), dtype=bool), {"kl": np.array([0.5])})
    passes.close()
    for file in tmp_path.iterdir():
        assert all(json.loads(line) for line in file.read_text().splitlines()), file


def test_configuration_goes_through_json_and_names_differences() -> None:
    again = RunConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict())), "start.json")
    assert again == CONFIG
    assert CONFIG.difference(again) is None
    assert CONFIG.difference(replace(CONFIG, threshold=0.1)) == "threshold is 0.1 there, 0.05 here"
    with pytest.raises(PahqError, match=r"start.json: the record has other options .*\(seed\)"):
        RunConfig.from_dict({k: v for k, v in CONFIG.to_dict().items() if k != "seed"}, "start.json")


def test_configuration_offers_what_the_method_knows() -> None:
    assert CHOICES["ablation"] == ABLATIONS
    assert CHOICES["head_order"] == get_args(HeadOrder)
    assert CHOICES["sender_order"] == get_args(SenderOrder)
    assert {f.name for f in fields(AcdcOptions)} <= {f.name for f in fields(RunConfig)}
    for option in fields(AcdcOptions):
        if option.name not in ("threshold", "metric", "policy"):
            assert option.default == getattr(CONFIG, option.name)
    assert get_policy(CONFIG.policy) == AcdcOptions(0.1).policy
    assert CHOICES["under_test"] == get_args(UnderTest)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("threshold", math.nan),
        ("threshold", math.inf),
        ("threshold", -0.1),
        ("threshold", "0.1"),
        ("n", 0),
        ("seed", -1),
        ("method", "magic"),
        ("ablation", "noise"),
        ("head_order", "up"),
        ("sender_order", "up"),
        ("dtype", "int8"),
        ("under_test", "mlp"),
        ("exact", "yes"),
        ("check", 1),
        ("policy", 8),
    ],
)
def test_impossible_options_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(PahqError, match=f"^{option}: '?{value}"):
        RunConfig(**CONFIG.to_dict() | {option: value})


def test_a_folder_belongs_to_one_process_and_one_run(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        assert folder.config() is None
        folder.begin(CONFIG, {"weights": "a" * 64}, {})
        with pytest.raises(PahqError, match="another process is writing"):
            RunFolder(tmp_path / "run")
    with RunFolder(tmp_path / "run") as folder:
        assert folder.config() == CONFIG
        folder.check(CONFIG)
        with pytest.raises(PahqError, match=r"another run .seed is 0 there, 1 here"):
            folder.check(replace(CONFIG, seed=1))
        with pytest.raises(PahqError, match="weights are no longer those"):
            folder.begin(CONFIG, {"weights": "b" * 64}, {})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(PahqError, match=r"not the folder of a run \(it holds 'thesis.tex'"):
        RunFolder(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(PahqError, match="no such file or folder"):
        RunFolder(tmp_path / "absent", create=False)


def test_leftovers_of_the_first_instant_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()
    (tmp_path / f".{START_FILE}.99.tmp").write_text("{")
    with RunFolder(tmp_path) as folder:
        folder.begin(CONFIG, {}, {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [LOCK_FILE, START_FILE]


@pytest.mark.parametrize("text", ["", "{}", '{"format": "pahq-run-1"}'])
def test_a_damaged_start_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / START_FILE).write_text(text)
    with pytest.raises(PahqError, match=r"start\.json: .*damaged"), RunFolder(tmp_path) as folder:
        folder.config()
