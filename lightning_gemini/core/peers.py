"""What the ranks tell each other when one of them cannot go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from lightning_gemini.core.errors import PeerError

#: How long to look for the word of a rank whose connection has closed; it leaves its word first.
_PATIENCE_SECONDS = 3.0


class KeyValues(Protocol):
    """What of a ``torch.distributed.Store`` is needed here."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


class Board:
    """Where a rank that fails says why, for those who then find its connection closed.

    Args:
        store: shared by the ranks, and by no other board; what is said stays there, outside of any collective.
    """

    def __init__(self, store: KeyValues, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size

    def post(self, word: str) -> None:
        """Leaves this rank's last word. Says nothing if the store is gone."""
        try:
            self._store.set(str(self._rank), word)
        except RuntimeError:
            return  # rank 0 or the launcher, which keep the store, have ended already

    def read(self) -> dict[int, str]:
        """The words of the other ranks that have left one."""
        try:
            others = [rank for rank in range(self._world_size) if rank != self._rank]
            return {rank: self._store.get(str(rank)).decode() for rank in others if self._store.check([str(rank)])}
        except RuntimeError:
            return {}

    @contextmanager
    def explains(self) -> Iterator[None]:
        """Around a wait for other ranks.

        Raises:
            PeerError: the wait failed; with the word of the rank that failed first of all, if it left one.
        """
        try:
            yield
        except PeerError:
            raise
        except RuntimeError as error:
            raise PeerError(self._explain(error)) from error

    def _explain(self, error: RuntimeError) -> str:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not (words := self.read()) and time.monotonic() < deadline:
            time.sleep(0.05)
        own = [f"rank {rank} failed: {word}" for rank, word in words.items() if not word.startswith(PeerError.__name__)]
        if own or words:
            return "; ".join(own or [f"rank {rank} ended: {word}" for rank, word in words.items()])
        return f"the connection to the other ranks broke, and none of them said why; see their own output ({error})"
