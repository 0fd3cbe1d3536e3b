"""Precision policies: by name, as a table, from a file; what they refuse, in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pahq.errors import PahqError
from pahq.method.acdc import AcdcOptions
from pahq.precision.policy import FP32, KINDS, LINEAR, POLICIES, ROUNDED, Policy, get_policy

ATTENTION = ("q", "k", "v", "o")
CPU = torch.device("cpu")


def formats(policy: Policy) -> dict[str, str]:
    return {kind: policy.format(kind).name for kind in KINDS}


def test_the_papers_table() -> None:
    """FP8 attention, BF16 for the rest, FP32 under test; RTN-Q rounds everything to unscaled FP8."""
    paper = formats(get_policy("pahq-values"))
    assert {paper[kind] for kind in ATTENTION} == {"e4m3"}
    assert {paper[kind] for kind in ("mlp", "unembed", "embed", "norm")} == {"bf16"}
    assert {paper[kind] for kind in ("residual", "softmax", "metric")} == {"fp32"}
    assert get_policy("pahq-values").under_test == "both"
    assert set(formats(get_policy("rtn")).values()) == {"e4m3-unscaled"}
    assert get_policy("rtn").under_test == "none"
    ours = formats(get_policy("pahq"))
    assert {ours[kind] for kind in ATTENTION} == {"e4m3"}
    assert ours["mlp"] == ours["unembed"] == "bf16"
    assert {ours[kind] for kind in ROUNDED} == {"fp32"}


@pytest.mark.parametrize("name", list(POLICIES))
def test_named(name: str) -> None:
    policy, about = POLICIES[name]
    assert get_policy(name) is policy
    assert get_policy(policy) is policy
    assert policy.name == name
    assert about
    assert "\n" not in about
    assert policy.is_fp32 + policy.differences + policy.values == 1
    assert policy.differences == (name in ("bf16", "int8", "e4m3", "pahq"))
    again = policy.to_dict()
    assert json.loads(json.dumps(again)) == again
    assert set(again["formats"]) == set(KINDS)
    assert Policy(**again) == replace(policy, formats=again["formats"])


def test_named_of_one_format() -> None:
    for name in ("bf16", "int8", "e4m3"):
        assert {kind: formats(get_policy(name))[kind] for kind in LINEAR} == dict.fromkeys(LINEAR, name)


def test_tables() -> None:
    policy = get_policy("attention=e4m3,mlp=int8")
    assert policy.differences
    assert formats(policy) == dict.fromkeys(KINDS, "fp32") | dict.fromkeys(ATTENTION, "e4m3") | {"mlp": "int8"}
    assert formats(get_policy("linear=bf16, q=e5m2"))["q"] == "e5m2"  # later entries win; blanks do no harm
    assert formats(get_policy("linear=bf16, q=e5m2"))["k"] == "bf16"
    assert formats(get_policy("rest=int8")) == dict.fromkeys(KINDS, "fp32") | {"mlp": "int8", "unembed": "int8"}
    values = get_policy("values:norm=bf16,o=e4m3")
    assert values.values
    assert values.format("norm").name == "bf16"
    assert get_policy("mlp=fp32").is_fp32
    assert get_policy("values:mlp=fp32").is_fp32
    assert not get_policy("values:mlp=fp32").values


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"formats": {"attention": "e5m2", "mlp": "bf16"}, "under_test": "sender"}))
    policy = get_policy(str(file))
    assert policy.name == "mine"
    assert policy.format("o").name == "e5m2"
    assert policy.under_test == "sender"
    assert policy.differences
    for name, (known, _) in POLICIES.items():
        file.write_text(json.dumps(known.to_dict()))
        assert get_policy(str(file)).to_dict() == known.to_dict(), name


def test_under_test() -> None:
    for under, sender, receiver in (
        ("none", False, False),
        ("sender", True, False),
        ("receiver", False, True),
        ("both", True, True),
    ):
        policy = get_policy("pahq", under)
        assert (policy.sender_under_test, policy.receiver_under_test) == (sender, receiver)
        assert policy.formats == POLICIES["pahq"][0].formats
    assert get_policy("pahq", None) is get_policy("pahq", "both")
    assert get_policy("fp32", "none") is FP32


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("pahk", ["'pahk'", "did you mean 'pahq'?"]),
        ("quick", ["'quick'", "choose one of fp32, bf16"]),
        ("attention=fp9", ["'fp9'", "choose one of", "e4m3"]),
        ("attn=e4m3", ["'attn'", "known: q, k, v"]),
        ("attention=", ["COMPONENT=FORMAT"]),
        ("attention=e4m3,,mlp=bf16", ["COMPONENT=FORMAT"]),
        ("all=e4m3", ["'all'", "linear=e4m3"]),
        ("attention=e4m3,attention=bf16", ["attention has two formats, e4m3 and bf16"]),
        ("tf32", ["'tf32' is a format", "linear=tf32"]),
        ("norm=bf16", ["'norm'", "quantise values"]),
        ("metric=e4m3-unscaled", ["'metric'", "quantise values"]),
        ("nothing:mlp=bf16", ["'nothing'", "differences, values"]),
        ("missing.json", ["missing.json"]),
        ("", ["''"]),
    ],
)
def test_bad_specs_end_in_one_line(spec: str, words: list[str]) -> None:
    with pytest.raises(PahqError) as caught:
        get_policy(spec)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        "{}",
        '{"formats": 3}',
        '{"formats": {"mlp": "bf16"}, "colour": "red"}',
        '{"formats": {"mlp": "fp9"}}',
        '{"formats": {"mlp": 8}}',
        '{"formats": {"all": "bf16"}}',
        '{"formats": {"head": "bf16"}}',
        '{"formats": {"mlp": "bf16"}, "quantised": "both"}',
        '{"formats": {"mlp": "bf16"}, "quantised": ["values"]}',
        '{"formats": {"mlp": "bf16"}, "under_test": "everything"}',
        '{"formats": {"mlp": "bf16"}, "under_test": {}}',
        '{"formats": {"mlp": "bf16"}, "others_under_test": "no"}',
    ],
)
def test_bad_files_end_in_one_line(content: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.json"
    file.write_text(content)
    with pytest.raises(PahqError) as caught:
        get_policy(str(file))
    assert "\n" not in str(caught.value)
    assert "odd" in str(caught.value)


def test_under_test_errors() -> None:
    with pytest.raises(PahqError, match="under_test 'half' is unknown; choose one of none, sender, receiver, both"):
        get_policy("pahq", "half")
    with pytest.raises(PahqError, match="policy 'fp32' has no other precision"):
        get_policy("fp32", "both")


def test_require() -> None:
    get_policy("pahq").require(CPU)
    get_policy("fp32").require(CPU, torch.float64)
    with pytest.raises(PahqError, match=r"policy 'pahq': .*float64; use --dtype float32"):
        get_policy("pahq").require(CPU, torch.float64)
    with pytest.raises(PahqError, match=r"^policy 'mlp=tf32': format 'tf32': cpu has no TF32"):
        get_policy("mlp=tf32").require(CPU)
    with pytest.raises(PahqError, match=r"^policy 'int8': format 'int8': mps"):
        get_policy("int8").require(torch.device("mps"))
    get_policy("bf16").require(torch.device("mps"))


def test_exact_needs_differences() -> None:
    def options(policy: str, exact: bool | None) -> AcdcOptions:
        return AcdcOptions(0.01, policy=get_policy(policy), exact=exact)

    unset: dict[str, Any] = {name: options(name, None).escalates for name in POLICIES}
    assert unset == {name: POLICIES[name][0].differences for name in POLICIES}
    assert not options("pahq", False).escalates
    for name in ("fp32", "pahq-values", "rtn"):
        assert not options(name, False).escalates
        with pytest.raises(PahqError, match=f"^exact: policy '{name}'"):
            options(name, True)


def test_a_narrower_word_takes_back_a_part_of_a_wider_one() -> None:
    policy = get_policy("linear=bf16,mlp=int8")
    assert (policy.formats["mlp"], policy.formats["q"]) == ("int8", "bf16")
