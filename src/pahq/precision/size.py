"""What a model's weights take under a policy, counted without making any copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pahq.model.transformer import Transformer
from pahq.precision.policy import LINEAR, Policy
from pahq.precision.store import component_of

SCALE_BYTES = 4


def weight_bytes(model: Transformer, policy: Policy) -> dict[str, int]:
    """Bytes of the weights that a device has to hold, by component kind, scales (one an output) included.

    Under a policy that quantises differences the embedding is none of them: only FP32 passes read it, once, from the
    host. One tensor that embeds and unembeds counts once, as unembedding, where both have one format.
    ``policy.heads`` is left aside: what they take comes on top, see ``head_bytes``.
    """
    return _sizes(model, policy, embedding=not policy.differences)


def table_bytes(model: Transformer, formats: Mapping[str, str], quantised: str) -> int:
    """The sum of ``weight_bytes`` for a table of formats, which may be FP32 throughout."""
    return sum(_sizes(model, Policy("table", formats, "values"), embedding=quantised == "values").values())


def _sizes(model: Transformer, policy: Policy, embedding: bool) -> dict[str, int]:
    sums: dict[str, int] = {}
    seen: set[tuple[int, str]] = set()
    for name in sorted(model.weights, key=lambda name: name != "unembed.W_U"):
        weight, kind = model.weights[name], component_of(name)
        fmt = policy.format(kind)
        key = (weight.untyped_storage().data_ptr(), fmt.name)
        if kind == "embed" and (key in seen or not embedding):
            continue
        if kind == "unembed":
            seen.add(key)
        size = weight.nbytes if fmt.bits == 32 else weight.numel() * fmt.bits // 8
        if fmt.scaled:
            outputs = weight.numel() // weight.shape[-2] if kind in LINEAR else weight.numel() // weight.shape[-1]
            size += SCALE_BYTES * outputs
        sums[kind] = sums.get(kind, 0) + size
    return sums


def head_bytes(model: Transformer, heads: Iterable[tuple[int, int]]) -> int:
    """Bytes of the FP32 matrices of heads (layer, head); keys and values that heads share count once."""
    cfg, itemsize = model.config, model.dtype.itemsize
    chosen = set(heads)
    groups = {(layer, head // cfg.group_size) for layer, head in chosen}
    return 2 * cfg.d_model * cfg.d_head * itemsize * (len(chosen) + len(groups))
