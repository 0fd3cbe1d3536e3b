"""The weight store: copies made once, in the policy's formats, next to masters that are the model's own tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny
from pahq.model.config import ModelConfig
from pahq.model.transformer import Transformer, build
from pahq.precision.formats import round_to
from pahq.precision.matrix import low_matrix
from pahq.precision.policy import FP32, get_policy
from pahq.precision.store import Held, WeightStore, component_of
from pahq.precision.values import rounded_model
from random_models import random_weights

CFG = ModelConfig(2, 4, 2, 24, 6, 40, 30, 30, 8, gated=True, act="silu", norm="rms")


def grouped() -> Transformer:
    return build(CFG, random_weights(CFG, 0, set(), torch.float32))


def test_every_matrix_in_its_format() -> None:
    model = grouped()
    policy = get_policy("q=e4m3,k=e5m2,v=int8,o=bf16,mlp=int8")
    store = WeightStore(model, policy)
    for layer, block in enumerate(model.blocks):
        weights = {"q": block.attn.W_Q, "k": block.attn.W_K, "v": block.attn.W_V, "o": block.attn.W_O}
        for name, weight in weights.items():
            for index in range(len(weight)):
                matrix = store.matrix(name, layer, index)
                assert matrix.fmt.name == policy.formats[name]
                expected = low_matrix(weight[index], policy.formats[name])
                assert torch.equal(matrix.values.float(), expected.values.float())
                assert store.master(name, layer, index).data_ptr() == weight[index].data_ptr()
                assert store.matrix(name, layer, index) is matrix  # made once
        assert block.mlp is not None
        for name, weight in {
            "mlp_in": block.mlp.W_in,
            "mlp_gate": block.mlp.W_gate,
            "mlp_out": block.mlp.W_out,
        }.items():
            assert weight is not None
            assert store.matrix(name, layer).fmt.name == "int8"
            assert torch.equal(store.matrix(name, layer).values, low_matrix(weight, "int8").values)
            assert store.master(name, layer) is weight
    assert store.matrix("unembed").fmt.name == "fp32"
    assert store.master("unembed") is model.W_U


def test_bytes_held() -> None:
    store = WeightStore(grouped(), get_policy("pahq"))
    assert store.held() == []
    store.make_all()
    store.matrix("unembed")
    held = {entry.component: entry for entry in store.held()}
    assert {component: entry.format for component, entry in held.items()} == {
        **dict.fromkeys("qkvo", "e4m3"),
        "mlp": "bf16",
        "unembed": "bf16",
    }
    assert all(entry.place == "device" for entry in held.values())
    layers, scale = 2, 4
    assert held["q"].nbytes == layers * 4 * (24 * 6 + 6 * scale)
    assert held["k"].nbytes == held["v"].nbytes == layers * 2 * (24 * 6 + 6 * scale)
    assert held["o"].nbytes == layers * 4 * (24 * 6 + 24 * scale)
    assert held["mlp"].nbytes == layers * 3 * 24 * 40 * 2
    assert held["unembed"].nbytes == 24 * 30 * 2


def test_exact_matrices_take_no_memory() -> None:
    model = grouped()
    store = WeightStore(model, FP32)
    store.make_all()
    assert store.held() == []
    assert store.matrix("q", 1, 2).values.data_ptr() == model.blocks[1].attn.W_Q[2].data_ptr()


def test_masters_count_every_weight_once() -> None:
    model = grouped()
    masters = WeightStore(model, get_policy("pahq")).masters()
    assert sum(entry.nbytes for entry in masters) == sum(weight.nbytes for weight in model.weights.values())
    assert {entry.format for entry in masters} == {"fp32"}
    assert {entry.place for entry in masters} == {"host"}
    components = {entry.component: entry.nbytes for entry in masters}
    assert components["mlp"] == 2 * 3 * 24 * 40 * 4
    assert components["q"] == 2 * 4 * 24 * 6 * 4


def test_tied_unembedding_counts_once() -> None:
    model = tiny.transformer(1)
    tied = build(model.config, {**model.weights, "unembed.W_U": model.weights["embed.W_E"].T})
    assert "unembed" not in {entry.component for entry in WeightStore(tied, FP32).masters()}


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("blocks.0.attn.W_Q", "q"),
        ("blocks.3.attn.W_O", "o"),
        ("blocks.0.mlp.W_gate", "mlp"),
        ("blocks.0.attn.b_Q", "norm"),
        ("embed.W_E", "embed"),
        ("pos_embed.W_pos", "embed"),
        ("unembed.W_U", "unembed"),
        ("ln_final.w", "norm"),
    ],
)
def test_component_of(name: str, component: str) -> None:
    assert component_of(name) == component


def test_rounded_embeddings_count() -> None:
    """Under a policy that rounds values the embeddings are copies, too."""
    model, policy = tiny.transformer(2), get_policy("rtn")
    store = WeightStore(model, policy)
    rounded_model(model, policy, store)
    held = [entry for entry in store.held() if entry.component in ("embed", "unembed")]
    assert model.W_pos is not None
    assert held == [
        Held("embed", policy.formats["embed"], "device", model.W_E.numel()),
        Held("embed", "fp32", "device", model.W_pos.nbytes),
        Held("unembed", policy.formats["unembed"], "device", model.W_U.numel()),
    ]
    assert store.held() == sorted(store.held())


@pytest.mark.parametrize(("table", "shared"), [("rtn", True), ("values:embed=bf16,unembed=e4m3", False)])
def test_tied_embeddings_are_held_once_in_one_format(table: str, shared: bool) -> None:
    model, policy = tiny.transformer(2), get_policy(table)
    model = replace(model, W_U=model.W_E.T)
    store = WeightStore(model, policy)
    low = rounded_model(model, policy, store)
    assert torch.equal(low.embed_tokens(torch.arange(3)), round_to(model.W_E, policy.format("embed"))[:3])
    assert torch.equal(low.columns(torch.arange(3)), round_to(model.W_E, policy.format("unembed"))[:3])
    held = {entry.component for entry in store.held() if entry.format != "fp32"}
    assert held & {"embed", "unembed"} == ({"unembed"} if shared else {"embed", "unembed"})
