"""What the ranks tell each other when one of them cannot go on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from lightning_gemini.core.errors import PeerError

#: How long to look for the word of a rank whose connection has closed; it leaves its word first.
_PATIENCE_SECONDS = 3.0

_boards: Counter[str] = Counter()


class Board:
    """Where a rank that fails says why, for those who then find its connection closed.

    All ranks of ``group`` make their boards in the same order. What is said stays in the group's store, outside of any
    collective.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        name = group.group_name
        self._store = PrefixStore(f"lightning_gemini/{_boards[name]}", group.get_group_store())
        _boards[name] += 1
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)

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
