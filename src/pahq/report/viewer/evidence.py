"""What the viewer shows of a node beside its edges: where a head looks, and which words a node writes."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pahq.engine.reference import Run, run
from pahq.graph import Graph, Sender
from pahq.model.transformer import Transformer
from pahq.task.prompts import Prompts

EXAMPLES = 3
"""Examples shown, or fewer where patterns would take more than ``PATTERN_BYTES``."""
PATTERN_BYTES = 900_000
TOKENS = 96
"""Of longer prompts only the last tokens are shown."""
UP, DOWN = 6, 4
"""Words a node raises and lowers most."""
FLOPS, LEAST = 5e10, 24
"""Work that words may take, a second or two, and nodes that get them whatever it takes; the most relevant first."""
ROWS = 64
"""Rows of vocabulary logits held at a time."""


@torch.no_grad()
def evidence(model: Transformer, prompts: Prompts, graph: Graph, nodes: Mapping[str, float]) -> dict[str, Any]:
    """JSON-ready tokens, attention patterns and words of the first examples, clean and corrupted.

    nodes: names of the circuit's nodes and how much each matters (the first to go where room is short matter least).
    ``patterns``: head -> example -> clean and corrupted pattern, a byte for each pair of tokens (255 stands for 1;
    only query >= key where attention is causal), in base64. ``words``: node -> example -> clean and corrupted words,
    raised and lowered, with the change of their logits relative to the vocabulary's mean, at the last position that
    the metric reads. It is the node's own output through the final norm, its scale that of the whole residual stream
    there, and the unembedding ("direct logit attribution"; Elhage et al. 2021); for ``logits``: the likeliest next
    words and their probabilities.
    """
    ranked = sorted(nodes, key=lambda name: -nodes[name])
    senders = {sender.name: sender for sender in graph.senders}
    heads = [name for name in ranked if name in senders and senders[name].kind == "head"]
    part = prompts[:EXAMPLES]
    spans = [_span(part, example) for example in range(len(part))]
    cells = [_cells(stop - start, model.config.causal) for start, stop in spans]
    shown = len(part)
    while shown > 1 and 2 * len(heads) * sum(cells[:shown]) > PATTERN_BYTES:
        shown -= 1
    part, spans = part[:shown], spans[:shown]
    fitting = heads[: PATTERN_BYTES // max(1, 2 * sum(cells[:shown]))]
    writers = [senders[name] for name in ranked if name in senders]
    room = max(LEAST, int(FLOPS / (2 * shown * 2 * model.config.d_model * model.config.d_vocab_out)))
    runs = {"clean": run(model, part.clean, graph.split_pos), "corrupt": run(model, part.corrupt, graph.split_pos)}
    texts = _Texts(model.tokenizer)
    notes = []
    if len(writers) > room:
        notes.append(f"words of the {room} most relevant nodes only, of {len(writers)}")
        writers = writers[:room]
    words = {name: _words(model, part, one, writers, texts) for name, one in runs.items()}
    if len(fitting) < len(heads):
        notes.append(f"attention patterns of the {len(fitting)} most relevant heads only, of {len(heads)}")
    if any(start for start, _ in spans):
        notes.append(f"only the last {TOKENS} tokens of long prompts are shown")
    return {
        "examples": [_example(part, index, spans[index], texts) for index in range(shown)],
        "patterns": _patterns(model, runs, spans, [senders[name] for name in fitting]),
        "words": {
            name: [{side: words[side][name][index] for side in runs} for index in range(shown)]
            for name in [*(sender.name for sender in writers), "logits"]
        },
        "causal": model.config.causal,
        "notes": notes,
    }


class _Texts:
    """Tokens' texts, each decoded once; a number where there is no tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            text = f"#{token}" if self._tokenizer is None else str(self._tokenizer.decode([token]))
            self._known[token] = text or f"#{token}"
        return self._known[token]


def _span(prompts: Prompts, example: int) -> tuple[int, int]:
    """The tokens of an example that are shown: none of its padding."""
    stop = prompts.clean.shape[1]
    if prompts.pad is not None:
        stop -= int(prompts.pad[example].sum())
    return max(0, stop - TOKENS), stop


def _cells(tokens: int, causal: bool) -> int:
    return tokens * (tokens + 1) // 2 if causal else tokens * tokens


def _read(prompts: Prompts) -> Tensor:
    """int64 [B]: the last position of each example that the metric reads."""
    last = prompts.read_mask.long().cumsum(-1).argmax(-1)
    return prompts.read.gather(1, last[:, None])[:, 0]


def _example(prompts: Prompts, index: int, span: tuple[int, int], texts: _Texts) -> dict[str, Any]:
    tokens = {"clean": prompts.clean[index], "corrupt": prompts.corrupt[index]}
    return {side: [texts(token) for token in ids[slice(*span)].tolist()] for side, ids in tokens.items()} | {
        "read": int(_read(prompts)[index]) - span[0]
    }


def _patterns(
    model: Transformer, runs: Mapping[str, Run], spans: Sequence[tuple[int, int]], heads: Sequence[Sender]
) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {head.name: [{} for _ in spans] for head in heads}
    for layer in sorted({head.layer for head in heads}):
        for side, one in runs.items():
            pattern = model.attention(one.q[layer], one.k[layer])  # [B, H, T, T]
            packed = (pattern.float() * 255).round().to(torch.uint8).cpu()
            for head in heads:
                if head.layer != layer:
                    continue
                for example, (start, stop) in enumerate(spans):
                    piece = packed[example, head.index, start:stop, start:stop]
                    if model.config.causal:
                        piece = piece[tuple(torch.tril_indices(*piece.shape))]
                    text = base64.b64encode(piece.contiguous().numpy().tobytes()).decode()
                    found[head.name][example][side] = text
    return found


def _words(
    model: Transformer, prompts: Prompts, one: Run, writers: Sequence[Sender], texts: _Texts
) -> dict[str, list[dict[str, list[list[Any]]]]]:
    """Node -> example -> ``up`` and ``down``: words and what the node adds to their logits."""
    where = _read(prompts)
    rows = torch.arange(len(prompts), device=where.device)
    final = one.final[rows, where]  # [B, d]
    found: dict[str, list[dict[str, list[list[Any]]]]] = {}
    step = max(1, ROWS // len(prompts))
    for begin in range(0, len(writers), step):
        some = writers[begin : begin + step]
        out = torch.stack([_written(model, one, sender, rows, where) for sender in some])  # [some, B, d]
        logits = model.times_unembedding(through_norm(model, out, final)).float()
        logits = logits - logits.mean(-1, keepdim=True)
        up, down = _largest(logits, UP, texts), _largest(-logits, DOWN, texts)
        for place, sender in enumerate(some):
            found[sender.name] = [
                {"up": up[place][b], "down": [[word, -value] for word, value in down[place][b]]} for b in rows.tolist()
            ]
    likely = model.unembed(final).float().softmax(-1)[None]
    found["logits"] = [{"up": words, "down": []} for words in _largest(likely, UP + DOWN, texts)[0]]
    return found


def _written(model: Transformer, one: Run, sender: Sender, rows: Tensor, where: Tensor) -> Tensor:
    """What a node adds to the residual stream at the positions read: [B, d]."""
    value = one.sender(sender)
    value = value.expand(len(rows), *value.shape[1:])[rows, where]
    return model.masters[sender.layer].attn.write(value, sender.index) if sender.kind == "head" else value


def through_norm(model: Transformer, part: Tensor, whole: Tensor) -> Tensor:
    """Parts [..., d] of a residual stream ``whole`` [..., d] -> their shares of its final norm, without its bias.

    The shares of all parts sum to the norm of the whole, less the bias.
    """
    norm = model.ln_final
    if norm.kind == "none":
        return part
    if norm.kind == "layer":
        part = part - part.mean(-1, keepdim=True)
        whole = whole - whole.mean(-1, keepdim=True)
    scaled = part * torch.rsqrt(whole.square().mean(-1, keepdim=True) + norm.eps)
    return scaled if norm.w is None else scaled * norm.w


def _largest(values: Tensor, count: int, texts: _Texts) -> list[list[list[list[Any]]]]:
    """values [nodes, B, V] -> for each node and example the words of the largest values, and these."""
    top = values.topk(min(count, values.shape[-1]), dim=-1)
    return [
        [
            [[texts(token), float(f"{value:.4g}")] for token, value in zip(ids, sizes, strict=True)]
            for ids, sizes in zip(node_ids, node_sizes, strict=True)
        ]
        for node_ids, node_sizes in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
