"""How unsharded chunks are filled: with this rank's shard, and with what the other ranks have.

NOTE: after an update.
What is brought ahead of its need may still be updated in the background. Then this rank's slice is copied by the thread
that updates, as soon as that is over, and nobody waits. The other ranks' slices are gathered in one order on all ranks,
which must not depend on how far an update is on one of them: the gather of a chunk that has been updated since it was
last gathered begins with a later moment, a few gathers ahead of what is needed then. Where updates take little time
(not ``patient``) all gathers begin with the next moment, and what is left of the updates is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock

import torch

from lightning_gemini.core.agree import TagBook, chunk_tag
from lightning_gemini.core.chunk import Chunk, Home
from lightning_gemini.core.collectives import Collectives, Pending
from lightning_gemini.core.counters import Counters
from lightning_gemini.core.layout import Layout
from lightning_gemini.core.streams import Lane, Mark


@dataclass(eq=False)
class _Arrival:
    """A chunk that is being filled; ``mark`` follows this rank's slice, and ``gather`` is there once it has begun.

    A copy that waits for an update is not begun once it is ``called_off``: the memory it would write to may be gone.
    """

    chunk: Chunk
    reason: str
    mark: Mark | None = None
    gather: Pending | None = None
    called_off: bool = False
    copying: Lock = field(default_factory=Lock)

    def call_off(self) -> None:
        """Has nothing copied from now on; the compute stream waits for what has been issued."""
        self.called_off = True
        with self.copying:
            if self.mark is not None:
                self.mark.join()


#: Gathers under way before more of those begin that may have to wait for an update: fewer hide less of what a gather
#: takes, more have the forward wait for updates that it does not need yet.
_GATHERS_AHEAD = 8


class Arrivals:
    """Chunks that are being filled.

    Args:
        layout: all chunks.
        lane: of the copies.
        tags: compares what has been gathered with what was wanted.
        counters: of the bytes.

    Attributes:
        patient: whether no more than a few gathers begin ahead of their need, so that nobody waits for updates that
            are not needed yet; to be set, equal on all ranks.
    """

    def __init__(
        self,
        layout: Layout,
        collectives: Collectives,
        lane: Lane,
        tags: TagBook,
        counters: Counters,
    ) -> None:
        self._layout = layout
        self._collectives = collectives
        self._lane = lane
        self._tags = tags
        self._counters = counters
        sizes = [chunk.nbytes for chunk in layout.chunks]
        self._common_nbytes = max(set(sizes), key=lambda nbytes: (sizes.count(nbytes), nbytes))
        self._longest_slice = max(sizes) // layout.world_size
        self.patient = True
        self._updated: set[int] = set()  # since they were last gathered, the same on all ranks
        self._under_way: dict[int, _Arrival] = {}
        self._before_gather: dict[int, _Arrival] = {}

    def updated(self, chunk: Chunk) -> None:
        """The shard of ``chunk`` is being updated, or has been, on all ranks."""
        self._updated.add(chunk.index)

    def begin(self, chunk: Chunk, reason: str, ahead: bool) -> None:
        """Begins to fill ``chunk``, which ``reason`` needs, now or ``ahead`` of that.

        Raises:
            DisagreementError: another rank gathers another chunk.
        """
        if ahead and chunk.index in self._updated:
            self._begin_after_update(chunk, reason)
        else:
            self._under_way[chunk.index] = self._bring(chunk, reason)

    @property
    def waiting(self) -> bool:
        """Whether :meth:`proceed` has something to do."""
        if self._layout.world_size == 1 or not self._before_gather:
            return False
        return not self.patient or len(self._under_way) < _GATHERS_AHEAD

    def proceed(self) -> None:
        """A moment begins: gathers what was begun ahead of its need, in that order, as far as it is needed soon.

        Raises:
            DisagreementError: another rank gathers another chunk.
        """
        while self.waiting:
            self._join(next(iter(self._before_gather.values())))

    def finish(self, chunk: Chunk) -> None:
        """What computes next waits until ``chunk`` is filled.

        Raises:
            DisagreementError: another rank gathers another chunk.
            UpdateError: the chunk has no proper values.
        """
        if chunk.index in self._before_gather:
            self._join(self._before_gather[chunk.index])
        self._arrive(self._under_way.pop(chunk.index))

    def abandon(self, chunk: Chunk) -> None:
        """Nobody needs ``chunk`` any more: waits for what is under way, but for no update, and begins nothing.

        Raises:
            DisagreementError: another rank gathers another chunk.
        """
        arrival = self._before_gather.pop(chunk.index, None)
        if arrival is not None:
            arrival.call_off()
        elif chunk.index in self._under_way:  # not if its gather could not begin
            self._arrive(self._under_way.pop(chunk.index))

    def forget(self, chunk: Chunk) -> None:
        """After a failure or an interrupt: ``chunk`` is not to be filled; waits for no other rank."""
        self._under_way.pop(chunk.index, None)
        if (arrival := self._before_gather.pop(chunk.index, None)) is not None:
            arrival.call_off()

    def refill(self, chunk: Chunk, reason: str) -> None:
        """Brings new values into a chunk that is filled."""
        self._arrive(self._bring(chunk, reason))

    def gather(self, chunk: Chunk, reason: str) -> Pending:
        """Starts to bring the other ranks' slices into a chunk that holds this rank's own; ``reason`` needs it."""
        self._updated.discard(chunk.index)
        self._counters.gathered_bytes += chunk.spec.nbytes - chunk.own.nbytes
        return self._collectives.gather(chunk.full, _label(chunk, reason))

    def _bring(self, chunk: Chunk, reason: str) -> _Arrival:
        shard = chunk.shard
        with self._lane.after_compute():
            self._clear_tag(chunk)
            self._announce(chunk, reason)
            chunk.own.copy_(shard, non_blocking=True)
            self._count(chunk)
            gather = self.gather(chunk, reason)
            return _Arrival(chunk, reason, self._lane.mark(), gather)

    def _begin_after_update(self, chunk: Chunk, reason: str) -> None:
        arrival = self._before_gather[chunk.index] = _Arrival(chunk, reason)

        def copy() -> None:
            with arrival.copying:
                if arrival.called_off:
                    return
                with torch.no_grad(), self._lane.work():
                    chunk.own.copy_(chunk.unfinished_shard, non_blocking=True)
                arrival.mark = self._lane.mark()

        with self._lane.after_compute():
            self._clear_tag(chunk)
        self._count(chunk)
        chunk.after_update(copy)

    def _join(self, arrival: _Arrival) -> None:
        """Begins the gather, after this rank's own update."""
        chunk = arrival.chunk
        _ = chunk.shard  # waits for its update, and for the copy after it
        assert arrival.mark is not None
        arrival.mark.join()
        del self._before_gather[chunk.index]
        with self._lane.after_compute():
            self._announce(chunk, arrival.reason)
            arrival.gather = self.gather(chunk, arrival.reason)
            arrival.mark = self._lane.mark()
        self._under_way[chunk.index] = arrival

    def _arrive(self, arrival: _Arrival) -> None:
        assert arrival.gather is not None
        assert arrival.mark is not None
        arrival.gather.wait()
        arrival.mark.join()
        if self._layout.world_size > 1:
            self._tags.note(arrival.chunk.index, arrival.chunk.tag, arrival.reason)

    def _clear_tag(self, chunk: Chunk) -> None:
        """Whatever was in the chunk's memory before must not pass for what did not come."""
        if self._layout.world_size > 1:
            chunk.tag.zero_()

    def _announce(self, chunk: Chunk, reason: str) -> None:
        if self._layout.world_size > 1 and chunk.spec.nbytes != self._common_nbytes:
            mark = chunk_tag(self._layout, chunk.index)
            for found in self._collectives.exchange_marks(mark, self._longest_slice, _label(chunk, reason)):
                self._tags.compare(chunk.index, found, reason)

    def _count(self, chunk: Chunk) -> None:
        if chunk.home is Home.HOST:
            self._counters.fetched_bytes += chunk.own.nbytes


def _label(chunk: Chunk, reason: str) -> str:
    return f"chunk {chunk.index} ({chunk.names[0]}) for {reason}"
