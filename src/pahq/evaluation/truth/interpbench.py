"""InterpBench: 86 small transformers trained to implement known circuits.

Each case of the hub's repository is a folder: ``ll_model.pth`` (weights in TransformerLens' names),
``ll_model_cfg.pkl`` (its configuration) and ``edges.pkl`` (the circuit, pairs of hook names). Nothing is unpickled:
see ``plain_pickle``; weights are read with torch's loader for tensors alone. The same files as ``.json`` and
``.safetensors`` are taken first. Source: Gupta et al. 2024 (arXiv 2407.14494).

The models were trained head by head: which of a head's query, key and value does the work was left open.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pahq.errors import PahqError
from pahq.evaluation.truth.base import INTERPBENCH, Truth, mask_of
from pahq.evaluation.truth.plain_pickle import read_plain_pickle
from pahq.files import naming
from pahq.graph import DIRECT, Graph

if TYPE_CHECKING:
    from pahq.model import Transformer

REPOSITORY = "cybershiptrooper/InterpBench"
_CASE = re.compile(r"\w+")
_NODE = re.compile(r"(?:blocks\.(\d+)\.)?(?:attn\.)?(hook_\w+)(?:\[(\d+)\])?")


def load(case: str) -> Truth:
    """A case by its name on the hub (``11``, ``ioi``), or a local folder with its files.

    Raises PahqError where the hub cannot be reached and for files that cannot be read safely.
    """
    folder = Path(case)
    if not folder.is_dir():
        if not _CASE.fullmatch(case):
            raise PahqError(
                f"InterpBench case '{case}': there is no such folder; give one, or a case's name such as 11"
            )
        folder = download(case)
    settings = _settings(folder)
    from pahq.model.transformer_lens import lens_config

    config = lens_config(settings.get)
    pairs = _pairs(folder)
    split = config.positions == "learned" and any("hook_pos_embed" in pair for pair in pairs)
    graph = Graph(config, split_pos=split)
    names = (edge_name(sender, receiver, folder) for sender, receiver in pairs)
    return Truth(
        name=f"{INTERPBENCH}{folder.name}",
        about=f"InterpBench case {folder.name}: a transformer trained to implement a known circuit",
        graph=graph,
        mask=mask_of(graph, (name for name in names if name)),
        get_model=partial(_model, folder, settings),
        facts={
            "kind": "trained (strict interchange interventions, at the level of heads)",
            "source": "Gupta et al. 2024 (arXiv 2407.14494)",
            "folder": str(folder),
        },
    )


def download(case: str) -> Path:
    """The local copy of a case's folder, downloaded if need be; raises PahqError if it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(REPOSITORY, allow_patterns=[f"{case}/*"])) / case
    except RepositoryNotFoundError:
        raise PahqError(f"InterpBench case '{case}': the hub has no {REPOSITORY}; give a local folder") from None
    except Exception as error:  # every network layer has its own exceptions
        raise PahqError(
            f"InterpBench case '{case}': not in the local cache, and the hub cannot be reached "
            f"({type(error).__name__}); go online once, or give a local folder"
        ) from None
    if not folder.is_dir():
        raise PahqError(f"InterpBench case '{case}': {REPOSITORY} has no such case; check the name")
    return folder


def edge_name(sender: str, receiver: str, folder: Path) -> str | None:
    """``blocks.0.attn.hook_result[2]`` and ``blocks.1.hook_q_input[3]`` -> ``a0.2->a1.3.q``.

    None for links inside a node (a head's query to its output, an MLP's input to its output), which are no edges.
    """
    if sender == "blocks.0.hook_resid_pre":
        sender = "hook_embed"
    found = [_NODE.fullmatch(name) for name in (sender, receiver)]
    if found[0] is None or found[1] is None:
        raise PahqError(f"{folder}: edge '{sender}' -> '{receiver}' is not in ACDC's names; the file is damaged")
    (start_layer, start, start_head), (layer, hook, head) = (match.groups() for match in found if match)
    if hook in ("hook_result", "hook_mlp_out"):
        return None
    receivers = {f"hook_{x}_input": f"a{layer}.{head}.{x}" for x in "qkv"}
    receivers |= {"hook_mlp_in": f"m{layer}", "hook_resid_post": "logits"}
    if hook in ("hook_q", "hook_k", "hook_v"):
        return f"{DIRECT}->a{layer}.{head}.{hook[-1]}"
    senders = {"hook_embed": "embed", "hook_pos_embed": "pos_embed", "hook_mlp_out": f"m{start_layer}"}
    senders["hook_result"] = f"a{start_layer}.{start_head}"
    if start not in senders or hook not in receivers:
        raise PahqError(f"{folder}: edge '{sender}' -> '{receiver}' joins no nodes of the graph; the file is damaged")
    return f"{senders[start]}->{receivers[hook]}"


def _read(folder: Path, stem: str) -> Any:
    """``stem.json``, or else ``stem.pkl`` as plain data."""
    path = folder / f"{stem}.json"
    if not path.exists():
        return read_plain_pickle(folder / f"{stem}.pkl")
    with naming(path):
        text = path.read_bytes()
    try:
        return json.loads(text)
    except ValueError as error:
        raise PahqError(f"{path}: not valid JSON ({error}); the file is damaged") from None


def _settings(folder: Path) -> dict[str, Any]:
    settings = _read(folder, "ll_model_cfg")
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise PahqError(f"{folder}: ll_model_cfg holds no settings by name; the file is damaged")
    return settings


def _pairs(folder: Path) -> list[tuple[str, str]]:
    edges = _read(folder, "edges")
    if not isinstance(edges, list):
        raise PahqError(f"{folder}: edges holds a {type(edges).__name__}, not a list of edges; the file is damaged")
    pairs: list[tuple[str, str]] = []
    for edge in edges:
        if not (isinstance(edge, list | tuple) and len(edge) == 2 and all(isinstance(end, str) for end in edge)):
            raise PahqError(f"{folder}: {edge!r} in edges is no pair of hook names; the file is damaged")
        pairs.append((edge[0], edge[1]))
    return pairs


def _model(folder: Path, settings: dict[str, Any]) -> Transformer:
    from pahq.model import load_model

    return load_model((_weights(folder), settings))


def _weights(folder: Path) -> dict[str, Any]:
    """Tensors by TransformerLens' names."""
    import torch
    from safetensors.torch import load_file

    safe, plain = folder / "ll_model.safetensors", folder / "ll_model.pth"
    path = safe if safe.exists() else plain
    if not path.is_file():
        raise PahqError(f"{folder}: there is neither {safe.name} nor {plain.name} in it; download the weights")
    try:
        state = load_file(path) if path == safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # either library has many
        reason = str(error).partition("\n")[0][:120]
        raise PahqError(f"{path}: cannot be read as tensors alone ({reason}); convert it to safetensors") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise PahqError(f"{path}: holds other things than tensors by name; convert it to safetensors")
    return state
