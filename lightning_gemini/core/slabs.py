"""Slabs: large pieces of host memory, cut into slots for what is copied to and from the device: shards and gradients.

Instead of one pinned allocation for each tensor: torch's pinned allocator rounds sizes up to powers of two (pytorch
issue 95823), and registering many small ranges with CUDA is slow.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gemini.core.errors import ConfigurationError, OutOfBudgetError, StateError
from lightning_gemini.core.memory import Tier, format_bytes
from lightning_gemini.core.pinning import CudaRuntime, pin

#: Slots start at multiples of this many bytes, and are as long: what copies and vector instructions want at the most.
SLOT_ALIGNMENT = 256


@dataclass(eq=False)
class _Slab:
    """``live`` of its slots are in use; ``unpin`` is there where it is pinned."""

    memory: Tensor
    live: int = 0
    unpin: Callable[[], object] | None = None


@dataclass(frozen=True, eq=False)
class _Slot:
    """A place in a slab; ``offset`` and ``nbytes`` are multiples of ``SLOT_ALIGNMENT``."""

    slab: _Slab
    offset: int
    nbytes: int


class Slabs:
    """Flat tensors in host memory, cut out of slabs that are pinned where the device profits from it.

    Slots are used again by tensors of any dtype that need as many bytes, rounded up to ``SLOT_ALIGNMENT``: where chunks
    are equally long, a gradient in bf16 fits where a shard in bf16 was. The tier counts slots, in use or not; a slab
    begins at a page and keeps the rest of its last page to itself, which is not counted.

    Copies that run in the background are not known here: a tensor must not be given back before its copies are over,
    nor memory be trimmed or closed.

    Args:
        tier: host memory; the slabs' bytes are counted there.
        pin: page-lock the slabs, for copies that run beside the host. Where the system refuses, they are pageable.
        runtime: the CUDA runtime that pins; ``torch.cuda.cudart()`` by default.

    Raises:
        ConfigurationError: the tier is not host memory.
    """

    def __init__(self, tier: Tier, pin: bool, runtime: CudaRuntime | None = None) -> None:
        if tier.device.type != "cpu":
            raise ConfigurationError(f"Slabs are host memory, and the tier is on {tier.device}: use the host tier.")
        self._tier, self._pin, self._runtime = tier, pin, runtime
        self._slabs: list[_Slab] = []
        self._free: dict[int, list[_Slot]] = {}
        self._live: dict[int, tuple[Tensor, _Slot]] = {}  # by the tensor's id, which is its own as long as it is here
        self._closed = False

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all slots, in use or not; as much of the tier is taken."""
        return sum(slab.memory.nbytes for slab in self._slabs)

    @property
    def free_bytes(self) -> int:
        """Bytes of the slots that are not in use."""
        return sum(slot.nbytes for slots in self._free.values() for slot in slots)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of all slots that are pinned."""
        return sum(slab.memory.nbytes for slab in self._slabs if slab.unpin is not None)

    def reserve(self, sizes: Iterable[int], what: str) -> None:
        """Makes one slab with a free slot for each tensor of these many bytes.

        Takes the sum of the slots from the tier: of each size rounded up to ``SLOT_ALIGNMENT``, and of at least one
        ``SLOT_ALIGNMENT``. Slots that are free already are not counted in.

        Raises:
            OutOfBudgetError: it is more than the tier or the system has; nothing is taken then.
            StateError: closed.
            ValueError: a size is negative.
        """
        slots = [_slot_bytes(size) for size in sizes]
        if slots:
            self._add(slots, what)

    def get(self, numel: int, dtype: torch.dtype, what: str) -> Tensor:
        """A tensor of shape ``(numel,)`` with undefined content: in a free slot, else in a new slab of one slot.

        It shares its version counter with no other tensor, and may be changed in place in and out of inference mode.

        Raises:
            OutOfBudgetError: there is no free slot, and a new one is more than the tier or the system has.
            StateError: closed.
            ValueError: ``numel`` is negative.
        """
        nbytes = _slot_bytes(numel * dtype.itemsize)
        if not self._free.get(nbytes):
            self._add([nbytes], what)
        slot = self._free[nbytes].pop()
        storage = slot.slab.memory.untyped_storage()
        with torch.inference_mode(False):
            tensor = torch.empty(0, dtype=dtype, device=self._tier.device)
            tensor.set_(storage, slot.offset // dtype.itemsize, (numel,), (1,))
        slot.slab.live += 1
        self._live[id(tensor)] = tensor, slot
        return tensor

    def put(self, tensor: Tensor) -> None:
        """Takes back a tensor that nobody uses any more; its slot is free then, and stays counted.

        Raises:
            StateError: it is not a tensor that ``get`` returned and that is still out; a view of one is not.
        """
        if id(tensor) not in self._live:
            storage = tensor.untyped_storage().data_ptr()
            own = any(slab.memory.untyped_storage().data_ptr() == storage for slab in self._slabs)
            reason = "was given back before, or is a view of one" if own else "does not come from these slabs"
            reason = "comes too late: these slabs are closed" if self._closed else reason
            raise StateError(
                f"expected a tensor that get() returned and that has not been given back, got one of {tensor.numel()} "
                f"elements of {tensor.dtype} that {reason}. Give back each tensor itself, once."
            )
        _, slot = self._live.pop(id(tensor))
        slot.slab.live -= 1
        self._free.setdefault(slot.nbytes, []).append(slot)

    def trim(self) -> None:
        """Unpins and frees the slabs that have no slot in use."""
        self._drop({slab for slab in self._slabs if not slab.live})

    def close(self) -> None:
        """Unpins and gives back everything; nothing can be had or given back after it, closing again does nothing.

        A tensor that is still out stays readable, in pageable memory that is freed with it and not counted any more.
        """
        self._closed = True
        self._live.clear()
        self._drop(set(self._slabs))

    def _add(self, slots: list[int], what: str) -> None:
        if self._closed:
            raise StateError(f"{what} asks for memory of slabs that are closed. Make new Slabs.")
        total = sum(slots)
        self._tier.take(total, what)
        try:
            slab = _Slab(self._allocate(total, what))
            if self._pin:
                slab.unpin = pin(slab.memory, slab, what, self._runtime)
        except BaseException:
            self._tier.give(total)
            raise
        self._slabs.append(slab)
        offset = 0
        for nbytes in slots:
            self._free.setdefault(nbytes, []).append(_Slot(slab, offset, nbytes))
            offset += nbytes

    def _allocate(self, nbytes: int, what: str) -> Tensor:
        with torch.inference_mode(False):
            # Pages of the slab's own, which the system fills when they are used first. torch.empty begins in the middle
            # of a page, and two registered ranges must not touch the same page. Private, as a shared mapping of
            # Python's default costs more to fill.
            try:
                pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                raise OutOfBudgetError(
                    f"{what} needs {format_bytes(nbytes)} of {self._tier.name} memory, and the system does not give "
                    f"them ({error.strerror}). Free host memory, or use more ranks."
                ) from error
            return torch.frombuffer(pages, dtype=torch.uint8)

    def _drop(self, slabs: set[_Slab]) -> None:
        for slab in slabs:
            if slab.unpin is not None:
                slab.unpin()
            self._tier.give(slab.memory.nbytes)
        self._slabs = [slab for slab in self._slabs if slab not in slabs]
        kept = {nbytes: [slot for slot in slots if slot.slab not in slabs] for nbytes, slots in self._free.items()}
        self._free = {nbytes: slots for nbytes, slots in kept.items() if slots}


def _slot_bytes(nbytes: int) -> int:
    if nbytes < 0:
        raise ValueError(f"sizes must not be negative, got {nbytes} bytes")
    return max(-(-nbytes // SLOT_ALIGNMENT), 1) * SLOT_ALIGNMENT
