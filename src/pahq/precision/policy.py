"""Precision policies: which component computes in which format, and what is quantised.

Wang et al. 2025 (arXiv 2510.23264) for ``pahq-values`` and ``rtn``; the others quantise differences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from pahq.errors import PahqError, choices
from pahq.files import read_json
from pahq.precision.formats import FORMATS, Format, get_format, require

LINEAR = ("q", "k", "v", "o", "mlp", "unembed")
"""Kinds of weight matrices."""
ROUNDED = ("embed", "norm", "residual", "softmax", "metric")
"""Results that are rounded as values: embeddings, norms' outputs, residual sums, attention patterns, logits."""
KINDS = (*LINEAR, *ROUNDED)
GROUPS = {"attention": ("q", "k", "v", "o"), "rest": ("mlp", "unembed"), "all": KINDS, "linear": LINEAR}
"""Words that stand for several kinds in a table."""

Quantised = Literal["differences", "values"]
UnderTest = Literal["none", "sender", "receiver", "both"]


@dataclass(frozen=True)
class Policy:
    """formats: kind -> format's name; kinds left out are FP32.

    quantised: ``differences``: every matrix product is carried on in FP32 from one state to the next by a
        low-precision product of their difference. ``values``: inputs themselves are rounded, the paper's way.
    under_test: which heads of the edge under test stay FP32. others_under_test: a receiving MLP, too.
    heads: (layer, head) whose products stay FP32 whatever is tested. (Norms and sums round as for all others.)
    """

    name: str
    formats: Mapping[str, str] = field(default_factory=dict)
    quantised: Quantised = "differences"
    under_test: UnderTest = "none"
    others_under_test: bool = False
    heads: frozenset[tuple[int, int]] = frozenset()

    def __post_init__(self) -> None:
        for kind, name in self.formats.items():
            if kind not in KINDS:
                raise PahqError(f"policy '{self.name}': component '{kind}' is unknown; known: {', '.join(KINDS)}")
            try:
                get_format(name)
            except PahqError as error:
                raise PahqError(f"policy '{self.name}': {error}") from None
        if not isinstance(self.others_under_test, bool):
            raise PahqError(
                f"policy '{self.name}': others_under_test is {self.others_under_test!r}; give true or false"
            )
        for what, value, known in (
            ("quantised", self.quantised, get_args(Quantised)),
            ("under_test", self.under_test, get_args(UnderTest)),
        ):
            if value not in known:
                raise PahqError(f"policy '{self.name}': {what} '{value}' is unknown; choose one of {', '.join(known)}")
        if self.quantised == "differences":
            for kind in ROUNDED:
                if not self.format(kind).is_exact:
                    raise PahqError(
                        f"policy '{self.name}': '{kind}' is no matrix product, so its differences cannot be quantised; "
                        "leave it FP32, or quantise values"
                    )

    def format(self, kind: str) -> Format:
        return get_format(self.formats.get(kind, "fp32"))

    @property
    def is_fp32(self) -> bool:
        return all(get_format(name).is_exact for name in self.formats.values())

    @property
    def differences(self) -> bool:
        """Whether differences are quantised (never in FP32, where nothing is)."""
        return self.quantised == "differences" and not self.is_fp32

    @property
    def values(self) -> bool:
        """Whether values are quantised."""
        return self.quantised == "values" and not self.is_fp32

    @property
    def sender_under_test(self) -> bool:
        return self.under_test in ("sender", "both")

    @property
    def receiver_under_test(self) -> bool:
        return self.under_test in ("receiver", "both")

    def require(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Raises PahqError where the device lacks a format, or the model is not in FP32 as low precision asks."""
        if not self.is_fp32 and dtype != torch.float32:
            raise PahqError(
                f"policy '{self.name}': mixes low precision with FP32, but the model is in {str(dtype)[6:]}; "
                "use --dtype float32, or --policy fp32"
            )
        for name in set(self.formats.values()):
            try:
                require(get_format(name), device)
            except PahqError as error:
                raise PahqError(f"policy '{self.name}': {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "formats": {kind: self.format(kind).name for kind in KINDS},
            "quantised": self.quantised,
            "under_test": self.under_test,
            "others_under_test": self.others_under_test,
        } | ({"heads": [f"a{layer}.{head}" for layer, head in sorted(self.heads)]} if self.heads else {})


def _of(attention: str, rest: str) -> dict[str, str]:
    return {**dict.fromkeys(GROUPS["attention"], attention), **dict.fromkeys(GROUPS["rest"], rest)}


_VALUES = _of("e4m3", "bf16") | {"embed": "bf16", "norm": "bf16"}
POLICIES: dict[str, tuple[Policy, str]] = {
    policy.name: (policy, about)
    for policy, about in (
        (Policy("fp32"), "everything in FP32: the reference"),
        (Policy("bf16", _of("bf16", "bf16")), "BF16 products of differences"),
        (Policy("int8", _of("int8", "int8")), "INT8 products of differences"),
        (Policy("e4m3", _of("e4m3", "e4m3")), "FP8 products of differences, no head in FP32"),
        (Policy("pahq", _of("e4m3", "bf16"), under_test="both"), "FP8 attention, BF16 rest, of differences"),
        (Policy("pahq-values", _VALUES, "values", "both"), "the paper's: FP8 attention, BF16 rest, of values"),
        (Policy("bf16-values", dict.fromkeys((*LINEAR, "embed", "norm"), "bf16"), "values"), "all of it in plain BF16"),
        (Policy("int8-values", _of("int8", "int8"), "values"), "INT8 products of values"),
        (Policy("rtn", dict.fromkeys(KINDS, "e4m3-unscaled"), "values"), "all rounded to FP8: the failure of RTN-Q"),
    )
}


FP32 = POLICIES["fp32"][0]


def get_policy(spec: str | Policy, under_test: str | None = None) -> Policy:
    """A policy by name, from a JSON file, or from a table such as ``attention=e4m3,mlp=int8``.

    A table quantises differences unless it begins with ``values:``. under_test overrides the policy's own.
    Raises PahqError for names that are unknown, and for files that are damaged.
    """
    policy = spec if isinstance(spec, Policy) else _find(spec)
    if under_test is None or under_test == policy.under_test:
        return policy
    if policy.is_fp32:
        raise PahqError(f"under_test '{under_test}': policy '{policy.name}' has no other precision; leave it out")
    return replace(policy, under_test=under_test)


def _find(spec: str) -> Policy:
    if spec in POLICIES:
        return POLICIES[spec][0]
    if spec.endswith(".json"):
        return _from_file(Path(spec))
    if "=" in spec:
        kind, colon, rest = spec.partition(":")
        quantised: Any = kind if colon else "differences"
        return Policy(spec, _table(spec, rest if colon else spec), quantised)
    if spec in FORMATS:
        raise PahqError(f"policy '{spec}' is a format; to hold all weights in it write linear={spec}")
    raise PahqError(
        f"policy '{spec}' is unknown; {choices(spec, POLICIES, 'choose one of')} "
        "(or give a .json file, or a table such as attention=e4m3,mlp=bf16)"
    )


def _table(spec: str, text: str) -> dict[str, str]:
    table: dict[str, str] = {}
    words: dict[str, str] = {}
    for item in text.split(","):
        kind, equals, name = item.strip().partition("=")
        if not equals or not name:
            raise PahqError(f"policy '{spec}': '{item}' is not COMPONENT=FORMAT; write for example mlp=bf16")
        if kind in words:  # a narrower word may well take back a part of a wider one
            raise PahqError(f"policy '{spec}': {kind} has two formats, {words[kind]} and {name}; leave one out")
        words[kind] = name
        table |= _kinds(spec, kind, name)
    return table


def _kinds(policy: str, kind: str, name: str) -> dict[str, str]:
    """A kind or a word for several, all in one format."""
    if kind == "all":
        raise PahqError(f"policy '{policy}': 'all' would round even the metric; write linear={name}")
    return dict.fromkeys(GROUPS.get(kind, (kind,)), name)


def _from_file(path: Path) -> Policy:
    facts = read_json(path)
    known = {"name", "formats", "quantised", "under_test", "others_under_test"}
    odd = sorted(set(facts) - known)
    if odd or not isinstance(facts.get("formats"), dict):
        what = f"'{odd[0]}' is no field of a policy" if odd else "it has no table 'formats'"
        raise PahqError(f"{path}: {what}; write {json.dumps({'formats': {'mlp': 'bf16'}})}")
    table: dict[str, str] = {}
    for kind, name in facts["formats"].items():
        table |= _kinds(str(path), kind, str(name))
    return Policy(**{**facts, "name": str(facts.get("name", path.stem)), "formats": table})
