"""InterpBench's folders: what is read from them, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from pahq.errors import PahqError
from pahq.evaluation.truth import load_truth
from pahq.evaluation.truth.interpbench import edge_name
from pahq.evaluation.truth.plain_pickle import read_plain_pickle

EDGES = [
    ("hook_embed", "blocks.0.hook_mlp_in"),
    ("blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out"),
    ("hook_pos_embed", "blocks.1.hook_q_input[2]"),
    ("blocks.0.hook_mlp_out", "blocks.1.hook_v_input[2]"),
    ("blocks.0.attn.hook_result[1]", "blocks.1.hook_k_input[2]"),
    ("blocks.1.hook_q_input[2]", "blocks.1.attn.hook_q[2]"),
    ("blocks.1.hook_v_input[2]", "blocks.1.attn.hook_v[2]"),
    ("blocks.1.attn.hook_q[2]", "blocks.1.attn.hook_result[2]"),
    ("blocks.1.attn.hook_result[2]", "blocks.1.hook_resid_post"),
]
NAMES = {
    *("embed->m0", "pos_embed->a1.2.q", "m0->a1.2.v", "a0.1->a1.2.k"),
    *("direct->a1.2.q", "direct->a1.2.v", "a1.2->logits"),
}


class Settings:
    """Stands for a configuration that was pickled as an object."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.__dict__.update(facts)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import builtins; builtins.pahq_was_here = True",)


def settings() -> dict[str, Any]:
    cfg = tiny.transformer(layers=2).config
    same = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "d_vocab_out", "n_ctx")
    return {name: getattr(cfg, name) for name in same} | {
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "attention_dir": "causal",
        "positional_embedding_type": "standard",
        "eps": 1e-5,
        "dtype": torch.float32,
        "device": "cpu",
        "seed": None,
        "attn_only": False,
        "initializer_range": -1.0,
    }


def make(folder: Path, edges: Any = EDGES, config: Any = None, protocol: int = 4) -> Path:
    """A folder as the hub's repository has them."""
    folder.mkdir(exist_ok=True)
    (folder / "ll_model_cfg.pkl").write_bytes(pickle.dumps(settings() if config is None else config, protocol))
    (folder / "edges.pkl").write_bytes(pickle.dumps(edges, protocol))
    (folder / "meta.json").write_text('{"epochs": 2000}')
    torch.save(dict(tiny.transformer(layers=2).weights), folder / "ll_model.pth")
    return folder


def case(folder: Path) -> str:
    return f"interpbench:{folder}"


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_case(tmp_path: Path, protocol: int) -> None:
    truth = load_truth(case(make(tmp_path / "11", protocol=protocol)))
    assert truth.name == "interpbench:11"
    assert set(truth.edge_names()) == NAMES
    assert truth.graph.split_pos
    model = truth.model()
    tokens = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(model.forward(tokens), tiny.transformer(layers=2).forward(tokens))
    with pytest.raises(PahqError, match="no prompts belong to it"):
        truth.task()


def test_a_configuration_pickled_as_an_object(tmp_path: Path) -> None:
    truth = load_truth(case(make(tmp_path / "ioi", config=Settings(settings()))))
    assert set(truth.edge_names()) == NAMES


def test_safe_formats_come_first(tmp_path: Path) -> None:
    folder = make(tmp_path / "11")
    plain = {name: value for name, value in settings().items() if name != "dtype"}
    (folder / "ll_model_cfg.json").write_text(json.dumps(plain))
    (folder / "edges.json").write_text(json.dumps(EDGES[:1]))
    save_file(dict(tiny.transformer(layers=2, seed=1).weights), folder / "ll_model.safetensors")
    for name in ("ll_model_cfg.pkl", "edges.pkl", "ll_model.pth"):
        (folder / name).write_bytes(b"damaged")
    truth = load_truth(case(folder))
    assert truth.edge_names() == ["embed->m0"]
    assert not truth.graph.split_pos
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(truth.model().forward(tokens), tiny.transformer(layers=2, seed=1).forward(tokens))


@pytest.mark.parametrize("name", ["ll_model_cfg.pkl", "edges.pkl", "ll_model.pth"])
def test_nothing_runs(tmp_path: Path, name: str) -> None:
    import builtins

    folder = make(tmp_path / "11")
    if name == "ll_model.pth":
        torch.save({"embed.W_E": Evil()}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(PahqError, match=name) as caught:
        load_truth(case(folder)).model()
    assert not hasattr(builtins, "pahq_was_here")
    assert "\n" not in str(caught.value)
    assert "convert it to" in str(caught.value)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ({"a": 1}, "holds a dict, not a list"),
        ([("hook_embed",)], "no pair of hook names"),
        ([("hook_embed", 3)], "no pair of hook names"),
        ([("hook_embed", "somewhere")], "not in ACDC's names"),
        ([("hook_embed", "blocks.0.hook_else")], "joins no nodes"),
        ([("blocks.1.hook_mlp_out", "blocks.0.hook_mlp_in")], "edge 'm1->m0' does not exist"),
    ],
)
def test_damaged_edges(tmp_path: Path, edges: Any, message: str) -> None:
    folder = make(tmp_path / "11", edges=edges)
    with pytest.raises(PahqError, match=message):
        load_truth(case(folder))


def test_missing_parts(tmp_path: Path) -> None:
    folder = make(tmp_path / "11")
    (folder / "ll_model.pth").unlink()
    with pytest.raises(PahqError, match="neither ll_model"):
        load_truth(case(folder)).model()
    (folder / "edges.pkl").unlink()
    with pytest.raises(PahqError, match="no such file"):
        load_truth(case(folder))
    with pytest.raises(PahqError, match="no such folder"):
        load_truth("interpbench:no/where")
    make(tmp_path / "11", config=[1, 2])
    with pytest.raises(PahqError, match="no settings by name"):
        load_truth(case(folder))


def test_without_a_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(PahqError, match="the hub cannot be reached"):
        load_truth("interpbench:11")
    make(tmp_path / "11")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(tmp_path))
    assert set(load_truth("interpbench:11").edge_names()) == NAMES
    with pytest.raises(PahqError, match="has no such case"):
        load_truth("interpbench:12")
    assert issubclass(RepositoryNotFoundError, Exception)


def test_names() -> None:
    here = Path()
    assert edge_name("blocks.0.hook_resid_pre", "blocks.0.hook_v_input[0]", here) == "embed->a0.0.v"
    assert edge_name("blocks.3.attn.hook_result[1]", "blocks.5.hook_resid_post", here) == "a3.1->logits"
    assert edge_name("blocks.3.attn.hook_v[1]", "blocks.3.attn.hook_result[1]", here) is None


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_data_comes_out_as_it_went_in(tmp_path: Path, protocol: int) -> None:
    shared = ["a", ("b", 1)]
    data = {
        "text": "é\n",
        "many": list(range(300)),
        "numbers": [0, -1, 255, 70000, 2**40, -(2**70), 0.5, True, False, None],
        "nested": {"x": [shared, shared, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}]},
    }
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(data, protocol))
    assert read_plain_pickle(path) == data


@pytest.mark.parametrize("data", [b"", b"garbage", pickle.dumps([1, 2, 3])[:-1], b".", b"a.", b"h\x05."])
def test_damaged_pickles(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "data.pkl"
    path.write_bytes(data)
    with pytest.raises(PahqError, match="the file is damaged"):
        read_plain_pickle(path)
