"""ACDC's lists of edges, as JSON, and the log of a run as text.

An edge joins two hook points of TransformerLens: ``child`` ``blocks.1.hook_q_input`` at ``child_index`` [null, null, 3]
reads ``parent`` ``blocks.0.attn.hook_result`` at ``parent_index`` [null, null, 0]. Such lists of objects are
written. Read are
  * a list of objects with these four and ``edge_type``, ``present`` (or ``kept``), ``effect``, ``order``;
  * the same, one object a line, of the edges that were tested;
  * a list of the edges kept, [child, index, parent, index] or [[child, index, parent, index], effect], or an object
    with such a list, ``kept_edges``;
  * what a verbose run prints: ``Node: cur_parent=TLACDCInterpNode(…)``, ``Result is …so keeping connection``.
ACDC's own pickles of such lists are not read: a pickle can run anything. Source: Conmy et al. 2023 and its code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.files import write_atomic
from pahq.graph import DIRECT, Graph
from pahq.report.interchange.files import File
from pahq.report.interchange.links import Link, Reading, about, coarse, fold, unfold, unknown_model

Record = dict[str, Any]
_ENDS = ("child", "child_index", "parent", "parent_index")
_NODE = re.compile(r"TLACDCInterpNode\(([\w.]+), \[([^\]]*)\]\)")
_STEP = re.compile(rf"cur_parent={_NODE.pattern} \(self\.current_node={_NODE.pattern}\)")
_DECISION = re.compile(r"Result is (\S+?)\.\.\.so (removing|keeping) connection")
_HOOK = re.compile(r"blocks\.(\d+)\.(?:attn\.)?hook_(\w+)")
_PLACEHOLDER = "PLACEHOLDER"


def matches(file: File) -> bool:
    return bool(_records(file)) or _is_log(file)


def _is_log(file: File) -> bool:
    return _DECISION.search(file.text) is not None and _STEP.search(file.text) is not None


def read(file: File, graph: Graph | None) -> Reading:
    """graph: whose circuit it is to be; None: a model of the size that the edges tell, if all are there."""
    where = str(file.path)
    records = list(_of_log(file)) if _is_log(file) else _records(file)
    if not records:
        raise PahqError(f"{where}: no list of ACDC's edges; see 'pahq convert --help' for the formats there are")
    edges = [record for record in records if not _within_node(record)]
    links = [_link(record, where) for record in edges]
    complete = graph is None and isinstance(file.json, dict) and isinstance(file.json.get("model_cfg"), dict)
    if graph is None:
        graph = _told(file.json, links, where) if complete else _inferred(links, file.path)
    _check_end(edges, graph, where)
    found = fold(links, graph, where)
    known = {"status", "present", "kept", "effect", "order", "edge_type", *_ENDS}
    more = sorted({name for record in edges for name in record} - known)
    lost = [f"of each edge: {', '.join(more)}"] if more else []
    if isinstance(file.json, dict):
        lost.append(f"also in the file: {', '.join(name for name in file.json if name != 'kept_edges')}")
    missing = graph.n_edges - len({link.name for link in links}) if graph.config.group_size == 1 else 0
    if missing > 0 and graph.split_qkv:
        lost.append(f"nothing is there about {missing:,} edges: they are taken as absent and untested")
    return Reading(found.circuit, (*found.lost, *lost))


def write(circuit: Circuit, path: Path) -> list[str]:
    """Writes every edge in ACDC's order, its links between a node's parts (``PLACEHOLDER``) included.

    Returns what the list could not hold, one line each.
    """
    lines = ",\n".join(json.dumps(record, allow_nan=False) for record in records_of(circuit))
    write_atomic(path, f"[\n{lines}\n]\n".encode())
    lost = coarse(circuit.graph, circuit.n_edges, sum(link.kept for link in unfold(circuit)))
    if not circuit.graph.direct_edges:
        lost.append("that direct edges were not looked at: ACDC has them in every circuit, and here they are missing")
    return lost + about(circuit, "layers, heads and where MLPs are")


def records_of(circuit: Circuit) -> Iterator[Record]:
    """The edges from the output back to the input, senders latest first, as ACDC visits nodes and lists parents."""
    graph = circuit.graph
    groups: dict[str, list[Link]] = {}
    for link in unfold(circuit):
        groups.setdefault(link.receiver, []).insert(0, link)
    used = {link.sender for links in groups.values() for link in links if link.kept}
    yield from _group(graph, groups["logits"])
    heads = range(graph.config.n_heads - 1, -1, -1)
    for layer in range(graph.config.n_layers - 1, -1, -1):
        if graph.config.d_mlp:
            yield _placeholder(f"blocks.{layer}.hook_mlp_out", f"blocks.{layer}.hook_mlp_in", None, f"m{layer}" in used)
            yield from _group(graph, groups[f"m{layer}"])
        for head in heads:
            for kind in "qkv":
                result, value = f"blocks.{layer}.attn.hook_result", f"blocks.{layer}.attn.hook_{kind}"
                yield _placeholder(result, value, head, f"a{layer}.{head}" in used)
        for direct in (True, False):
            for kind in "qkv":
                for head in heads:
                    links = groups[f"a{layer}.{head}.{kind}"]
                    yield from _group(graph, [link for link in links if (link.sender == DIRECT) == direct])


def _group(graph: Graph, links: list[Link]) -> Iterator[Record]:
    for link in sorted(links, key=lambda link: link.sender == "pos_embed"):  # which comes after the token's
        direct = link.sender == DIRECT
        child = _hook(graph, link.receiver, computed=direct)
        parent = _hook(graph, link.receiver, computed=False) if direct else _sender_hook(graph, link.sender)
        tested = link.order >= 0 or not math.isnan(link.effect)
        removed = "removed_by_threshold" if tested else "removed_disconnected"
        yield {
            **dict(zip(_ENDS, (*child, *parent), strict=True)),
            "edge_type": "DIRECT_COMPUTATION" if direct else "ADDITION",
            "status": "kept" if link.kept else removed,
            "present": link.kept,
            "effect": None if math.isnan(link.effect) else link.effect,
            "order": link.order if link.order >= 0 else None,
        }


def _placeholder(child: str, parent: str, head: int | None, present: bool) -> Record:
    index = [None] if head is None else [None, None, head]
    status = "placeholder_kept" if present else "placeholder_removed"
    facts = {"edge_type": _PLACEHOLDER, "status": status, "present": present, "effect": None, "order": None}
    return {**dict(zip(_ENDS, (child, index, parent, index), strict=True)), **facts}


def _hook(graph: Graph, receiver: str, computed: bool) -> tuple[str, list[int | None]]:
    """A receiver's hook point and index; computed: that of the query, key or value computed from it."""
    if receiver == "logits":
        return f"blocks.{graph.config.n_layers - 1}.hook_resid_post", [None]
    if receiver.startswith("m"):
        return f"blocks.{receiver[1:]}.hook_mlp_in", [None]
    layer, head, kind = receiver[1:].split(".")
    name = f"blocks.{layer}.attn.hook_{kind}" if computed else f"blocks.{layer}.hook_{kind}_input"
    return name, [None, None, int(head)]


def _sender_hook(graph: Graph, sender: str) -> tuple[str, list[int | None]]:
    if sender == "pos_embed":
        return "hook_pos_embed", [None]
    if sender == "embed":
        return "hook_embed" if graph.split_pos else "blocks.0.hook_resid_pre", [None]
    if sender.startswith("m"):
        return f"blocks.{sender[1:]}.hook_mlp_out", [None]
    layer, head = sender[1:].split(".")
    return f"blocks.{layer}.attn.hook_result", [None, None, int(head)]


def _records(file: File) -> list[Record]:
    """The file's edges as objects, [] where it holds no such list."""
    content = file.json
    if isinstance(content, dict):
        content = content.get("kept_edges")
    if not isinstance(content, list):
        content = file.json_lines
    if not isinstance(content, list) or not content:
        return []
    found = []
    for item in content:
        if isinstance(item, list) and len(item) == 2 and isinstance(item[0], list):
            item = [*item[0], item[1]]
        if isinstance(item, list) and len(item) in (4, 5):
            effect = {"effect": item[4]} if len(item) == 5 else {}
            item = dict(zip(_ENDS, item[:4], strict=True)) | {"present": True} | effect
        if not isinstance(item, dict) or not set(_ENDS) <= set(item) or not {"present", "kept"} & set(item):
            return []
        found.append(item)
    return found


def _of_log(file: File) -> Iterator[Record]:
    """The decisions that a run printed, in order."""
    node: re.Match[str] | None = None
    order = 0
    for number, line in enumerate(file.text.split("\n"), 1):
        node = _STEP.search(line) or node
        decision = _DECISION.search(line)
        if decision is None:
            continue
        if node is None:
            raise PahqError(f"{file.path}: line {number} decides about no edge; the log lacks its beginning")
        ends = (node[3], _index(node[4], file, number), node[1], _index(node[2], file, number))
        try:
            effect = float(decision[1])
        except ValueError:
            raise PahqError(f"{file.path}: line {number}: '{decision[1]}' is no effect; mend the log") from None
        facts = {"present": decision[2] == "keeping", "effect": effect, "order": order}
        yield {**dict(zip(_ENDS, ends, strict=True)), **facts}
        node, order = None, order + 1


def _index(text: str, file: File, number: int) -> list[int | None]:
    """``:, :, 3`` -> [None, None, 3]; other versions print COL or None for a colon."""
    index: list[int | None] = []
    for word in (word.strip(" '\"") for word in text.split(",")):
        if word in (":", "COL", "COLON", "None"):
            index.append(None)
        elif word.isdigit():
            index.append(int(word))
        else:
            raise PahqError(f"{file.path}: line {number}: '{word}' is no part of an index; mend the log")
    return index


def _link(record: Record, where: str) -> Link:
    child, parent = (_node(record[end], record[f"{end}_index"], where) for end in ("child", "parent"))
    kept = record.get("present", record.get("kept"))
    effect, order = record.get("effect"), record.get("order")
    wrong = not isinstance(kept, bool) or isinstance(effect, bool) or not isinstance(effect, int | float | None)
    if wrong or not (order is None or type(order) is int):
        raise PahqError(f"{where}: edge {parent}->{child} has {kept!r}, effect {effect!r}, order {order!r}; mend it")
    if parent == child:  # from the input of a query, key or value to itself, computed
        parent = DIRECT
    elif re.fullmatch(r"a\d+\.\d+\.[qkv]", parent):
        raise PahqError(f"{where}: {record['parent']} sends nothing to {record['child']}; mend the list")
    return Link(
        parent, child, bool(kept), math.nan if effect is None else float(effect), -1 if order is None else order
    )


def _within_node(record: Record) -> bool:
    """Whether it joins the parts of one node, as from a head's query to its result: no edge in ACDC's count."""
    return record.get("edge_type") == _PLACEHOLDER or str(record["child"]).endswith(
        ("attn.hook_result", "hook_mlp_out")
    )


def _check_end(records: list[Record], graph: Graph, where: str) -> None:
    """Raises PahqError where the edges end in another layer than the graph's last."""
    end = f"blocks.{graph.config.n_layers - 1}.hook_resid_post"
    for record in records:
        if str(record["child"]).endswith("hook_resid_post") and record["child"] != end:
            raise PahqError(
                f"{where}: its circuit ends in {record['child']}, but {graph.config.name} ends in {end}; "
                "give the model it is about"
            )


def _node(hook: Any, index: Any, where: str) -> str:
    """A hook point and index -> our name of the node by head; raises PahqError for what is none."""
    head = index[-1] if isinstance(index, list) and index else None
    found = _HOOK.fullmatch(hook) if isinstance(hook, str) else None
    if hook in ("hook_embed", "blocks.0.hook_resid_pre"):
        return "embed"
    if hook == "hook_pos_embed":
        return "pos_embed"
    if found is not None:
        layer, kind = found[1], found[2]
        if kind == "resid_post":
            return "logits"
        if kind in ("mlp_in", "mlp_out", "resid_mid"):
            return f"m{layer}"
        if type(head) is int and kind == "result":
            return f"a{layer}.{head}"
        if type(head) is int and kind.removesuffix("_input") in ("q", "k", "v"):
            return f"a{layer}.{head}.{kind[0]}"
    raise PahqError(f"{where}: {hook!r} {index!r} is no node of ACDC's graph; mend the list")


def _told(facts: dict[str, Any], links: list[Link], where: str) -> Graph:
    """The graph of the model that the file itself describes."""
    cfg = facts["model_cfg"]
    try:
        mlps = not cfg.get("attn_only", False)
        config = unknown_model(Path(where).stem, cfg["n_layers"], cfg["n_heads"], mlps, False, cfg["d_model"])
    except (KeyError, TypeError) as error:
        raise PahqError(f"{where}: its model_cfg cannot be read ({error}); name the model") from None
    return Graph(config, split_pos=any(link.sender == "pos_embed" for link in links))


def _inferred(links: list[Link], path: Path) -> Graph:
    """The graph of a model whose edges these all are; raises PahqError where some are missing."""
    ends = {name for link in links for name in (link.sender, link.receiver)}
    heads = [tuple(map(int, name[1:].split(".")[:2])) for name in ends if name.startswith("a")]
    mlps = {name for name in ends if name.startswith("m")}
    layers = max([layer for layer, _ in heads] + [int(name[1:]) for name in mlps], default=-1) + 1
    names = {link.name for link in links}
    graph = None
    if layers and heads:
        parallel = bool(mlps) and not any(link.name.startswith("a0.") and link.receiver == "m0" for link in links)
        config = unknown_model(path.stem, layers, 1 + max(head for _, head in heads), bool(mlps), parallel)
        direct = any(link.sender == DIRECT for link in links)
        graph = Graph(config, direct_edges=direct, split_pos=any(link.sender == "pos_embed" for link in links))
    if graph is None or len(names) < graph.n_edges:
        raise PahqError(
            f"{path}: holds {len(names):,} edges, which are not all of a model's and do not tell its size; "
            "name the model with --model, or a circuit of it with --like"
        )
    return graph
