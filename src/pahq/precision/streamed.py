"""A model whose FP32 weights stay in host memory and visit the device layer by layer.

Two layers and two pieces of the unembedding are on the device at most; norms, biases and position tables, which
are small, stay there. Everything else about the model is as before, so that the same passes run on it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from pahq.model.components import Norm, Rotary
from pahq.model.transformer import Block, Transformer
from pahq.precision.buffers import Loader, Slot, Tensors, pin
from pahq.precision.schedule import Scheduler

SLAB_BYTES, MOST_SLABS = 2 << 20, 64
"""Size of a piece of the unembedding, unless there were more than so many pieces."""


class StreamedBlocks(Sequence[Block]):
    """Blocks whose matrices are copied to the device when asked for, the following layer's ahead of time.

    A block handed out is valid until ``slots - 1`` other layers were asked for: with two slots, until the next one
    is; work already submitted with it goes on safely. Asking for the same layer again costs nothing. Ask from the
    caller's stream only, which waits for the copy.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        device: torch.device,
        scheduler: Scheduler,
        copy: bool | None = None,
        slots: int = 2,
    ) -> None:
        self.frames = [_frame(block, device) for block in blocks]
        self._weights = [tuple(pin(weight, device) for weight in _matrices(block)) for block in blocks]
        self.host = [_with_matrices(block, weights) for block, weights in zip(blocks, self._weights, strict=True)]
        self.scheduler = scheduler
        self.loader: Loader[int] = Loader(scheduler, self._weights.__getitem__, slots, copy)
        self._keep = max(1, slots - 1)
        self._out: dict[int, tuple[Slot, Block]] = {}  # valid blocks, the one asked for last at the end
        self._last = -1

    @overload
    def __getitem__(self, layer: int) -> Block: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[Block]: ...
    def __getitem__(self, layer: int | slice) -> Block | Sequence[Block]:
        if isinstance(layer, slice):
            raise AssertionError("streamed blocks: a slice would need several layers at a time; take one by one")
        layer = operator.index(layer)
        if not -len(self) <= layer < len(self):
            raise IndexError(f"layer {layer} of {len(self)}")
        layer %= len(self)
        if layer == self._last:
            return self._out[layer][1]
        in_order = layer == (self._last + 1) % len(self)
        if layer in self._out:
            self._out[layer] = self._out.pop(layer)
            self._last = layer
            return self._out[layer][1]
        while len(self._out) >= self._keep:
            self._out.pop(next(iter(self._out)))[0].release()
        slot = self.loader.fetch(layer)
        self.scheduler.join(slot.ready)
        block = _with_matrices(self.frames[layer], slot.tensors)
        self._out[layer], self._last = (slot, block), layer
        if in_order or layer == 0:  # a jump says nothing about what is next, and the other buffer may be wanted again
            self.loader.prefetch((layer + 1) % len(self))
        return block

    def __len__(self) -> int:
        return len(self.frames)


class Slabs:
    """W_U [d, V] as pieces of its columns, which visit the device one after the other.

    Pieces have the same width, so that buffers are reused; the last one is filled up with zeros.
    """

    def __init__(
        self,
        weight: Tensor,
        device: torch.device,
        scheduler: Scheduler,
        copy: bool | None = None,
        slab_bytes: int | None = None,
    ) -> None:
        slab_bytes = max(SLAB_BYTES, -(-weight.nbytes // MOST_SLABS)) if slab_bytes is None else slab_bytes
        self.scheduler, self.columns = scheduler, weight.shape[1]
        copies = device.type != "cpu" if copy is None else copy
        count = min(self.columns, max(1, -(-weight.nbytes // slab_bytes))) if copies else 1
        self.width = -(-self.columns // count)
        self._slabs: list[Tensors] = []
        for first in range(0, self.columns, self.width):
            slab = weight[:, first : first + self.width]
            if count > 1:
                slab = F.pad(slab, (0, self.width - slab.shape[1])).contiguous()
            self._slabs.append((pin(slab, device),))
        self.loader: Loader[int] = Loader(scheduler, self._slabs.__getitem__, 2, copy)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(its columns, the piece [d, width] on the device) in order; a piece is valid until the next is asked for."""
        for index in range(len(self._slabs)):
            slot = self.loader.fetch(index)
            try:
                self.loader.prefetch((index + 1) % len(self._slabs))
                self.scheduler.join(slot.ready)
                first = index * self.width
                part = slice(first, min(first + self.width, self.columns))
                yield part, slot.tensors[0][:, : part.stop - part.start]
            finally:
                slot.release()


@dataclass(frozen=True, kw_only=True)
class StreamedTransformer(Transformer):
    """home: the device that computes. W_E and W_U are the host's own tensors; ``slabs`` brings W_U to the device."""

    home: torch.device
    slabs: Slabs

    @property
    def device(self) -> torch.device:
        return self.home

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return self.W_E[tokens.to(self.W_E.device)].to(self.home)

    @property
    def frames(self) -> Sequence[Block]:
        assert isinstance(self.blocks, StreamedBlocks)
        return self.blocks.frames

    @property
    def masters(self) -> Sequence[Block]:
        assert isinstance(self.blocks, StreamedBlocks)
        return self.blocks.host

    def unembedding(self) -> Iterator[tuple[slice, Tensor]]:
        yield from self.slabs

    @property
    def device_bytes(self) -> int:
        """Bytes that the buffers for weights hold on the device."""
        assert isinstance(self.blocks, StreamedBlocks)
        return self.blocks.loader.device_bytes + self.slabs.loader.device_bytes


def streamed(
    model: Transformer,
    device: torch.device | str,
    scheduler: Scheduler,
    copy: bool | None = None,
    slab_bytes: int | None = None,
) -> StreamedTransformer:
    """``model``, whose weights are in host memory, as one that computes on ``device`` and keeps them there.

    copy: see ``Loader``; on a CPU the weights are used where they are. For a GPU they are copied once to
    page-locked host memory. Raises AssertionError for a scheduler of another device, or weights not on the host.
    """
    device = torch.device(device)
    if device.type != scheduler.device.type or device.index not in (None, scheduler.device.index):
        raise AssertionError(f"streamed: the scheduler is for {scheduler.device}, not for {device}")
    if model.W_E.device.type != "cpu":
        raise AssertionError(f"streamed: the weights are on {model.W_E.device}; load the model on the cpu")
    device = scheduler.device  # with its index
    rotary = model.rotary
    if rotary is not None:
        rotary = Rotary(rotary.cos.to(device), rotary.sin.to(device), rotary.interleaved)
    return StreamedTransformer(
        config=model.config,
        W_E=model.W_E,
        W_pos=None if model.W_pos is None else model.W_pos.to(device),
        blocks=StreamedBlocks(model.blocks, device, scheduler, copy),
        ln_final=_norm(model.ln_final, device),
        W_U=model.W_U,
        b_U=None if model.b_U is None else model.b_U.to(device),
        rotary=rotary,
        weights=model.weights,
        tokenizer=model.tokenizer,
        source=model.source,
        home=device,
        slabs=Slabs(model.W_U, device, scheduler, copy, slab_bytes),
    )


_ATTENTION = ("W_Q", "W_K", "W_V", "W_O")


def _mlp_names(block: Block) -> tuple[str, ...]:
    if block.mlp is None:
        return ()
    return ("W_in", "W_out") if block.mlp.W_gate is None else ("W_in", "W_out", "W_gate")


def _matrices(block: Block) -> Tensors:
    """The weights that are copied for every visit: nearly all bytes of a layer."""
    return tuple(getattr(block.attn, name) for name in _ATTENTION) + tuple(
        getattr(block.mlp, name) for name in _mlp_names(block)
    )


def _with_matrices(block: Block, weights: Tensors) -> Block:
    """The block with other matrices, in the order of ``_matrices``."""
    attn = replace(block.attn, **dict(zip(_ATTENTION, weights[: len(_ATTENTION)], strict=True)))
    names = _mlp_names(block)
    mlp = None if block.mlp is None else replace(block.mlp, **dict(zip(names, weights[len(_ATTENTION) :], strict=True)))
    return Block(block.ln1, attn, block.ln2, mlp)


def _frame(block: Block, device: torch.device) -> Block:
    """The block with everything but its matrices on the device; those are empty, so that none is used by mistake."""
    nothing = torch.empty(0)
    attn = _moved(block.attn, device)
    mlp = None if block.mlp is None else _moved(block.mlp, device)
    ln2 = None if block.ln2 is None else _norm(block.ln2, device)
    frame = Block(_norm(block.ln1, device), attn, ln2, mlp)
    gate = None if block.mlp is None or block.mlp.W_gate is None else nothing
    frame = replace(frame, mlp=mlp if mlp is None else replace(mlp, W_in=nothing, W_out=nothing, W_gate=gate))
    return replace(frame, attn=replace(attn, **dict.fromkeys(_ATTENTION, nothing)))


def _moved(part: Any, device: torch.device) -> Any:
    """An Attention or MLP with its biases and norms on the device."""
    changes: dict[str, Any] = {}
    for name, value in vars(part).items():
        if isinstance(value, Norm):
            changes[name] = _norm(value, device)
        elif isinstance(value, Tensor) and not name.startswith("W_"):
            changes[name] = value.to(device)
    return replace(part, **changes)


def _norm(norm: Norm, device: torch.device) -> Norm:
    return replace(
        norm,
        w=None if norm.w is None else norm.w.to(device),
        b=None if norm.b is None else norm.b.to(device),
    )
