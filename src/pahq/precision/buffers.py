"""FP32 weights on their way from host memory to the device: a few buffers, filled ahead of their use.

What a buffer holds may be overwritten only when all that read it are through, and may be read only when its copy
is. Both are questions of order, which the scheduler answers; here is who holds which buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.precision.schedule import CALLER, Done, Scheduler

K = TypeVar("K", bound=Hashable)
Tensors = tuple[Tensor, ...]


def pin(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor as ``device`` can copy it in the background: page-locked for CUDA, unchanged for a CPU.

    Also without gaps, since only then it is one copy. torch rounds page-locked sizes up to a power of two.
    """
    if device.type != "cuda":
        return tensor
    return (tensor if _dense(tensor) else tensor.contiguous()).pin_memory()


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory, in whatever order."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


class _Buffer:
    """Device memory of one slot, and who uses it."""

    def __init__(self) -> None:
        self.key: Any = None
        self.filled: Done[Tensors] | None = None
        self.users = 0
        self.used = 0  # when it was last asked for
        self.after: dict[str, Done[None]] = {}  # by lane, the last use that an overwrite must wait for
        self.memory: Tensors = ()  # set by the copy, which alone writes it

    @property
    def holds(self) -> bool:
        return self.filled is not None


class Slot:
    """One buffer while it holds one key's weights, until ``release``."""

    def __init__(self, loader: Loader[Any], buffer: _Buffer) -> None:
        assert buffer.filled is not None
        self._loader, self._buffer = loader, buffer
        self.key = buffer.key
        self.ready: Done[Tensors] = buffer.filled
        self._released: int | None = None  # the scheduler's count when it happened

    @property
    def tensors(self) -> Tensors:
        """The weights, for those who waited for ``ready``. Raises AssertionError after ``release``.

        A call that was submitted before the release may come to run after it: the order of submission counts.
        """
        running = self._loader.scheduler.running
        if self._released is not None and (running is None or running > self._released):
            held = "was replaced" if self._buffer.filled is not self.ready else "may be replaced any time"
            raise AssertionError(f"slot of {self.key}: used after its release (its buffer {held}); fetch it again")
        return self.ready.value

    def release(self, after: Done[Any] | None = None) -> None:
        """Lets the buffer be overwritten after ``after``, the last use (None: after all work issued so far).

        Raises AssertionError the second time.
        """
        if self._released is not None:
            raise AssertionError(f"slot of {self.key}: released twice")
        self._released = self._loader.scheduler.count()
        for done in self._loader.scheduler.issued() if after is None else (after.bare(),):
            known = self._buffer.after.get(done.lane)
            if known is None or known.number < done.number:
                self._buffer.after[done.lane] = done
        self._buffer.users -= 1


class Loader(Generic[K]):
    """Copies ``source(key)`` to the device, into one of ``slots`` buffers, on the stream ``load``.

    source: host tensors of a key (page-locked if the device is CUDA: see ``pin``). copy: False hands out the host's
    own tensors, which is the default on a CPU. copier: what does the copy (source, old buffers) -> buffers.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        source: Callable[[K], Tensors],
        slots: int = 2,
        copy: bool | None = None,
        copier: Callable[[Tensors, Any], Any] | None = None,
    ) -> None:
        if slots < 1:
            raise AssertionError(f"loader: {slots} slots; at least one is needed")
        self.scheduler, self.source = scheduler, source
        self.copies = scheduler.device.type != "cpu" if copy is None else copy
        if not self.copies and scheduler.device.type != "cpu":
            raise AssertionError(f"loader: {scheduler.device} cannot compute on host memory; leave copy on")
        self._copier = copier or self._copy
        self._buffers = [_Buffer() for _ in range(slots)]
        self._clock = 0

    def fetch(self, key: K) -> Slot:
        """The slot of a key: at once if it is there or on its way, else its copy is started.

        Raises AssertionError if all buffers are in use. Wait for ``slot.ready`` before using ``slot.tensors``.
        """
        buffer = self._find(key) or self._free()
        if buffer is None:
            held = ", ".join(str(buffer.key) for buffer in self._buffers)
            raise AssertionError(f"loader: no buffer is free for {key} (in use: {held}); release a slot first")
        if not buffer.holds or buffer.key != key:
            self._load(buffer, key)
        self._touch(buffer)
        buffer.users += 1
        return Slot(self, buffer)

    def prefetch(self, key: K) -> bool:
        """Starts a key's copy if a buffer is free; whether it is there or on its way.

        Does nothing without a load stream: a copy in the caller's own order would gain no time.
        """
        if self._find(key) is not None:
            return True
        buffer = self._free() if self.scheduler.lane("load") != CALLER else None
        if buffer is None:
            return False
        self._load(buffer, key)
        self._touch(buffer)
        return True

    @property
    def device_bytes(self) -> int:
        """Bytes that the buffers hold now; the host's own tensors are not counted."""
        return sum(tensor.nbytes for buffer in self._buffers for tensor in buffer.memory)

    def _find(self, key: K) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.holds and buffer.key == key), None)

    def _free(self) -> _Buffer | None:
        """The buffer to be overwritten: of those nobody uses, the one that was asked for longest ago."""
        return min((buffer for buffer in self._buffers if not buffer.users), key=lambda b: b.used, default=None)

    def _touch(self, buffer: _Buffer) -> None:
        self._clock += 1
        buffer.used = self._clock

    def _load(self, buffer: _Buffer, key: K) -> None:
        source = self.source(key)
        if self.copies and self.scheduler.device.type == "cuda":
            _check_pinned(key, source)

        def call() -> Any:
            if not self.copies:
                return source
            # Made and remade on the load stream: memory fresh from another stream's pool could still be read there.
            buffer.memory = self._copier(source, buffer.memory)
            return buffer.memory

        after = tuple(buffer.after.values())
        buffer.after = {}
        buffer.key = key
        buffer.filled = self.scheduler.submit("load", f"load {key}", call, after)

    def _copy(self, source: Tensors, memory: Tensors) -> Tensors:
        device = self.scheduler.device
        if [_form(t) for t in memory] != [_form(t) for t in source]:
            memory = tuple(torch.empty_like(tensor, device=device) for tensor in source)  # strides are kept too
        background = self.scheduler.lane("load") != CALLER
        for target, tensor in zip(memory, source, strict=True):
            target.copy_(tensor, non_blocking=background)
        return memory


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _check_pinned(key: Hashable, source: Tensors) -> None:
    for tensor in source:
        if not tensor.is_pinned() or not _dense(tensor):
            raise AssertionError(f"loader: a weight of {key} is not page-locked memory in one piece; see pin()")


def assemble(low: Tensor, slot_index: slice | int, high: Tensor, dim: int = 0) -> Tensor:
    """Mixed-precision assembly: writes the FP32 result into its place of the low-precision stream's tensor.

    low: float32, heads (or other slots) along ``dim``: the low stream's products, accumulated in FP32.
    slot_index: one slot (high lacks ``dim``) or a slice of them. Gives ``low``, changed in place.
    Raises PahqError naming what does not fit.
    """
    for name, tensor in (("low", low), ("high", high)):
        if tensor.dtype != torch.float32:
            raise PahqError(f"assembly: the {name} stream's tensor is {tensor.dtype}, not torch.float32; convert it")
    if low.device != high.device:
        raise PahqError(f"assembly: the low stream's tensor is on {low.device}, the high stream's on {high.device}")
    count = low.shape[dim]
    if isinstance(slot_index, int):
        if not 0 <= slot_index < count:
            raise PahqError(f"assembly: slot {slot_index} is not one of the {count} slots of the low stream's tensor")
        place = low.select(dim, slot_index)
    else:
        first, stop, step = slot_index.start or 0, slot_index.stop, slot_index.step
        stop = count if stop is None else stop
        if not 0 <= first < stop <= count or step not in (None, 1):
            raise PahqError(f"assembly: slots {first}:{stop} are not in the {count} slots of the low stream's tensor")
        place = low.narrow(dim, first, stop - first)
    if place.shape != high.shape:
        raise PahqError(
            f"assembly: the high stream's tensor has shape {list(high.shape)}, its place {list(place.shape)}"
        )
    place.copy_(high)
    return low
