"""Sizes and settings of every model that is trained."""

from __future__ import annotations

from dataclasses import dataclass

from pahq.model.config import ModelConfig


@dataclass(frozen=True)
class Case:
    """A model of ``n_layers`` layers of four heads and an MLP, and how long it is trained.

    batch: prompts a step, in pairs that serve as each other's source. decay: AdamW's weight decay, which quiets parts
    that the program does not use. alone: share of the training at its start in which all edges outside the circuit
    carry means over the batch, and probes hold its nodes to the program's variables: else other ways are found sooner.
    alike: (layer, head) whose keys begin as its queries do. offset: what is added to all position embeddings at the
    start: a mean of the residual stream, which every LayerNorm takes out again.
    """

    n_layers: int
    d_model: int
    d_mlp: int
    steps: int
    batch: int = 128
    rate: float = 3e-3
    decay: float = 0.1
    alone: float = 0.3
    alike: tuple[tuple[int, int], ...] = ()
    offset: float = 0.0
    seed: int = 0

    def config(self, name: str, d_vocab: int, length: int) -> ModelConfig:
        return ModelConfig(
            n_layers=self.n_layers,
            n_heads=4,
            n_kv_heads=4,
            d_model=self.d_model,
            d_head=self.d_model // 4,
            d_mlp=self.d_mlp,
            d_vocab=d_vocab,
            d_vocab_out=d_vocab,
            n_ctx=length,
            act="gelu",
            name=f"trained-{name}",
            architecture="custom",
        )


CASES = {
    "sum": Case(n_layers=2, d_model=32, d_mlp=128, steps=1000),
    "majority": Case(n_layers=3, d_model=32, d_mlp=64, steps=1200),
    "induction": Case(n_layers=3, d_model=48, d_mlp=96, steps=1500, alone=0.4),
    "induction-offset": Case(n_layers=3, d_model=48, d_mlp=96, steps=1100, alone=0.4, offset=64.0),
    "maximum": Case(n_layers=2, d_model=32, d_mlp=64, steps=1500),
    "ioi": Case(n_layers=6, d_model=48, d_mlp=96, steps=1200, batch=64, alone=0.5, alike=((0, 1),)),
}
