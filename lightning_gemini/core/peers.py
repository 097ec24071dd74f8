"""What ranks tell each other outside of any collective: that one of them cannot go on, and where each of them is."""

from __future__ import annotations

import time
from typing import Protocol

#: How long to look for the word of a rank whose connection has closed; it leaves its word first.
_PATIENCE_SECONDS = 3.0

#: Thousands of ranks that all read what all have said would keep the store busy for longer than they have time.
_READING_SECONDS = 5.0


class KeyValues(Protocol):
    """What of a ``torch.distributed.Store`` is needed here."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


class Board:
    """Where a rank that fails says why, for those who then find its connection closed, and a stuck one where it is.

    Args:
        store: shared by the ranks, and by no other board; what is said stays there, outside of any collective. If it is
            gone, nothing is said or read: rank 0 or the launcher, which keep it, have ended already.

    Attributes:
        rank: this one.
        world_size: the number of ranks.
        others: all ranks but this one.
    """

    def __init__(self, store: KeyValues, rank: int, world_size: int) -> None:
        self._store, self.rank, self.world_size = store, rank, world_size
        self.others = [other for other in range(world_size) if other != rank]

    def post(self, word: str) -> None:
        """Leaves this rank's last word."""
        self._set(str(self.rank), word)

    def read(self) -> dict[int, str]:
        """The last words of the other ranks that have left one."""
        return self._read("")

    def wait_for_words(self) -> dict[int, str]:
        """Like :meth:`read`, but gives a rank whose connection has closed a moment to be heard."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not (words := self.read()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return words

    def tell(self, where: str) -> None:
        """Says where this rank is, for ranks that are stuck."""
        self._set(f"at {self.rank}", where)

    def told(self) -> dict[int, str]:
        """Where the other ranks are, as far as they have told."""
        return self._read("at ")

    def call(self, number: int) -> None:
        """Asks all ranks where they are, because this one is stuck for the ``number``-th time."""
        self._set("call", f"{self.rank} {number}")

    def called(self) -> str | None:
        """The latest call: the rank that called, and for the how-many-th time."""
        return self._get("call")

    def _read(self, prefix: str) -> dict[int, str]:
        found, deadline = {}, time.monotonic() + _READING_SECONDS
        for rank in self.others:
            word = self._get(f"{prefix}{rank}")
            if word is not None:
                found[rank] = word
            if time.monotonic() > deadline:
                break
        return found

    def _set(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except RuntimeError:
            return

    def _get(self, key: str) -> str | None:
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError:
            return None
