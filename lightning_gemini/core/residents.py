"""The chunks that are unsharded and may be freed again: in use, idle, or on their way."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress

from lightning_gemini.core.chunk import Chunk, ChunkState, Home
from lightning_gemini.core.errors import GeminiError, OutOfBudgetError
from lightning_gemini.core.store import Store


class Residents:
    """Moves chunks between these three, on command.

    Args:
        store: all chunks.

    Attributes:
        idle: resident and unused, the oldest first.
        coming: begun before somebody needs them.
        in_use: pinned.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.idle: dict[int, Chunk] = {}
        self.coming: dict[int, Chunk] = {}
        self.in_use: dict[int, Chunk] = {}
        self._owed: list[int] = []  # that the next step begins with and that are not on their way yet

    def begin(self, chunk: Chunk, reason: str) -> None:
        """Begins to bring a chunk that is not there.

        Raises:
            OutOfBudgetError: the system has no memory for it; on one rank nothing happens then, and it is brought when
                it is needed.
        """
        if chunk.state is not ChunkState.FREE:
            return
        try:
            self._store.start(chunk, reason, ahead=True)
        except OutOfBudgetError:
            if self._store.layout.world_size > 1:
                raise
            return
        self.coming[chunk.index] = chunk

    def bring(self, chunk: Chunk, reason: str) -> None:
        """Makes a chunk resident, which may be coming."""
        if chunk.state is ChunkState.FREE:
            self._store.start(chunk, reason)
        else:
            del self.coming[chunk.index]
            self._store.counters.prefetched += 1
        self._store.finish(chunk)

    def owe(self, chunks: Sequence[int]) -> None:
        """The next step begins with ``chunks``, in this order; they are begun with :meth:`begin_owed`."""
        self._owed = list(chunks)

    def begin_owed(self) -> None:
        """Begins to bring what the next step begins with, which the other ranks do, too.

        Raises:
            OutOfBudgetError: there is no memory for one; it stays owed.
        """
        while self._owed:
            self.begin(self._store.chunks[self._owed[0]], "the next step")
            del self._owed[0]

    def drop(self, chunk: Chunk) -> None:
        """Frees a chunk that nobody uses; one that is coming arrives first."""
        if self.coming.pop(chunk.index, None) is not None:
            self._store.abandon(chunk)
        elif self.idle.pop(chunk.index, None) is not None:
            self._store.reshard(chunk)

    def drop_oldest(self) -> None:
        """Frees the chunk that has been idle for the longest time."""
        self.drop(next(iter(self.idle.values())))

    def drop_all_but(self, kept: Collection[int]) -> None:
        """Frees what nobody uses, but for ``kept``."""
        self.begin_owed()
        for chunk in (*self.idle.values(), *self.coming.values()):
            if chunk.index not in kept:
                self.drop(chunk)

    def rest(self, chunk: Chunk) -> None:
        """Nobody uses a resident chunk any more."""
        self.in_use.pop(chunk.index, None)
        if chunk.home is not Home.FULL:
            self.idle[chunk.index] = chunk

    def let_go(self) -> None:
        """Takes away all pins: what was in use is idle."""
        for chunk in list(self.in_use.values()):
            while chunk.pins:
                chunk.unpin()
            self.rest(chunk)

    def reset(self) -> None:
        """Frees whatever is unsharded, in use or not; waits for nobody who has parted."""
        with suppress(GeminiError):
            self.begin_owed()
        self._owed.clear()
        for chunk in list(self.coming.values()):
            with suppress(GeminiError):  # the others have parted: it is freed all the same
                self._store.abandon(chunk)
        for chunk in self._store.chunks:
            while chunk.pins:
                chunk.unpin()
            if chunk.home is not Home.FULL and chunk.resident:
                self._store.reshard(chunk)
        for held in (self.idle, self.coming, self.in_use):
            held.clear()
