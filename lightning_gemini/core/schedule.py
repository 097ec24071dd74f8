"""Which chunks stay unsharded: least-recently-used, as long as there is no plan."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_gemini.core.chunk import Chunk, Home
from lightning_gemini.core.errors import OutOfBudgetError, StateError
from lightning_gemini.core.layout import Layout
from lightning_gemini.core.memory import Tier, format_bytes
from lightning_gemini.core.store import Store

#: Idle chunks that stay unsharded. One is often needed again at once (a parent's weight, the last unit of the forward),
#: the second bridges a parameter between two uses; more would be a guess.
IDLE_CHUNKS = 2


class Schedule:
    """Unshards chunks as units need them and frees the ones that have been idle the longest.

    All ranks run the same units, so they free and gather the same chunks in the same order.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._idle: dict[int, Chunk] = {}  # resident and unused, the oldest first
        self._expired: set[int] = set()  # updated in the backward under way
        store.device.spare = self._make_room
        #: whether any chunk is ever freed; if not, parameters are always resident
        self.moving = any(chunk.home is not Home.FULL for chunk in store.chunks)

    def acquire(self, chunk: Chunk, reason: str) -> None:
        """Makes ``chunk`` resident for ``reason`` (a unit's name) and pins it until :meth:`release`.

        Raises:
            StateError: it holds other values than when the backward under way began.
        """
        if chunk.index in self._expired:
            raise StateError(
                f"{reason} needs {chunk.names[0]} in a backward that has updated it already, because all of its "
                "gradients seemed to be in (is it used detached, or by several reentrant checkpoints?). Use "
                "update='at_step' instead of 'in_backward'."
            )
        self._idle.pop(chunk.index, None)
        if not chunk.resident:
            self._store.unshard(chunk, reason)
        chunk.pin()

    def release(self, chunk: Chunk) -> None:
        """Ends one use; a chunk nobody uses any more becomes idle."""
        chunk.unpin()
        if chunk.pins == 0 and chunk.index in self._expired:
            self._store.reshard(chunk)
        elif chunk.pins == 0 and chunk.home is not Home.FULL:
            self._idle[chunk.index] = chunk
            while len(self._idle) > IDLE_CHUNKS:
                self._free_oldest()

    def renew(self, chunk: Chunk, refill: bool = True) -> None:
        """The shard of ``chunk`` has changed: brings the new values if it is kept or in use, frees it if it is idle.

        Args:
            refill: whether who uses it now is to see the new values; if not, the chunk expires: it is freed after its
                last use, and nobody may use it again until :meth:`backward_over`.
        """
        if chunk.home is Home.FULL:
            self._store.refresh(chunk).wait()
            return
        if not refill:
            self._expired.add(chunk.index)
        if self._idle.pop(chunk.index, None) is not None:
            self._store.reshard(chunk)
        elif chunk.resident and refill:
            self._store.fill(chunk, "its new values after a step")

    def backward_over(self) -> None:
        """What has expired may be used again, with its new values."""
        self._expired.clear()

    def reset(self) -> None:
        """Frees whatever is unsharded, in use or not; after a failed step and before the end."""
        for chunk in self._store.chunks:
            while chunk.pins:
                chunk.unpin()
            if chunk.home is not Home.FULL and chunk.resident:
                self._store.reshard(chunk)
        self._idle.clear()
        self._expired.clear()

    def _make_room(self, nbytes: int) -> None:
        while self._idle and not self._store.device.room(nbytes):
            self._free_oldest()

    def _free_oldest(self) -> None:
        self._store.reshard(self._idle.pop(next(iter(self._idle))))


def choose_homes(layout: Layout, tier: Tier, placement: str, state_bytes: int) -> list[Home]:
    """Where the shards live, before there is a plan.

    Args:
        placement: ``"device"``, ``"host"`` or ``"auto"``.
        state_bytes: what gradients, masters and optimizer states take on the device beside the chunks, on this rank.

    Raises:
        OutOfBudgetError: ``placement="device"`` and the shards alone do not fit, or not even the largest chunk does.
    """
    shards = layout.nbytes // layout.world_size
    if placement != "host":
        if tier.room(layout.nbytes + state_bytes):
            return [Home.FULL] * len(layout.chunks)
        if tier.room(shards + state_bytes + _working_set(layout)):
            return [Home.DEVICE] * len(layout.chunks)
        if placement == "device":
            raise OutOfBudgetError(
                f"placement='device' needs {format_bytes(shards + state_bytes + _working_set(layout))} of device "
                f"memory on each of {layout.world_size} rank(s), for the shards of parameters, gradients and optimizer "
                f"states and the chunks in use, but {format_bytes(tier.capacity or 0)} may be used. Use "
                "placement='auto' or 'host', more ranks, or a larger device_memory."
            )
    largest = max(layout.chunks, key=lambda chunk: chunk.nbytes)
    if not tier.room(largest.nbytes):
        raise OutOfBudgetError(
            f"the largest chunk, with {layout.params[largest.first_param].name} in it, takes "
            f"{format_bytes(largest.nbytes)} while it is in use, but {format_bytes(tier.capacity or 0)} of device "
            "memory may be used. Use a larger device_memory, or a smaller chunk_size if no one parameter is that large."
        )
    return [Home.HOST] * len(layout.chunks)


def _working_set(layout: Layout) -> int:
    """Bytes of the unsharded chunks and gradient buffers that are in use at one time, about."""
    largest: Sequence[int] = sorted((chunk.nbytes for chunk in layout.chunks), reverse=True)
    return sum(largest[: IDLE_CHUNKS + 1]) + 2 * sum(largest[:1])
