"""The run that a sweep starts from when edges are gone already: a circuit's in the full model's place."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pahq.engine.full import FullEvaluator
from pahq.engine.reference import Run
from pahq.graph import Graph
from pahq.model.transformer import Transformer
from pahq.task.prompts import Prompts


def circuit_run(model: Transformer, prompts: Prompts, graph: Graph, mask: np.ndarray, reference: Run) -> Run:
    """All values of one pass of the model whose only edges are those of ``mask``.

    mask: bool [n_receivers, n_senders + 1]; reference: the run that the others fall back to. The receivers' inputs
    are not among the values (``attn_in`` and ``mlp_in`` are empty): every head has its own. But ``final`` is.
    """
    keeper = _Keeper(model, prompts, graph, reference)
    keeper.logits(mask)
    kept = keeper.kept
    embed, pos = model.embed(prompts.clean)
    if pos is not None:
        pos = pos[None]
        if not graph.split_pos:
            embed, pos = model.add(embed, pos), None
    (final,) = kept.pop("final")
    return Run(embed=embed, pos_embed=pos, attn_in=[], mlp_in=[], final=final, **kept)


class _Keeper(FullEvaluator):
    """Keeps what passes: name -> one value a layer."""

    def __init__(self, model: Transformer, prompts: Prompts, graph: Graph, reference: Run) -> None:
        super().__init__(model, prompts, graph, reference=reference)
        self.kept: dict[str, list[Tensor]] = {key: [] for key in ("q", "k", "v", "z", "mlp", "final")}

    def _keep(self, name: str, value: Tensor) -> None:
        self.kept[name].append(value)
