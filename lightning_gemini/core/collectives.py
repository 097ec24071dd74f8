"""The one file that calls torch.distributed.

Two process groups, because the order of gathers and the order of reductions are agreed separately: gathers follow the
units, reductions the order of rank 0's first backward, and how the two interleave may differ from rank to rank.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from lightning_gemini.core.errors import StateError
from lightning_gemini.core.peers import Board
from lightning_gemini.core.worker import Worker

# torch 2.13 renamed the two and warns on the old names; 2.11 has the old names only.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(Protocol):
    """A collective under way; ``wait`` may be called once."""

    def wait(self) -> None: ...

    def done(self, seconds: float) -> bool:
        """Whether :meth:`wait` would not block, now or within ``seconds``."""


class Collectives:
    """Collectives on flat buffers for the ranks of one group; all of them local where there is one rank.

    Args:
        group: the ranks that share the chunks; ``None`` for a single process.
        reduce_group: the same ranks in a group of its own for reduce-scatters; ``group`` if not given.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, reduce_group: dist.ProcessGroup | None = None) -> None:
        self._gathers = group
        self._reduces = reduce_group or group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self._exchange = group is not None and dist.get_backend(group) == "gloo"
        self._board = None if group is None else _new_board(group)
        self._parted = False
        self._waiter = Worker("gemini-wait") if self._exchange else None

    def shard_of(self, full: Tensor) -> Tensor:
        """This rank's slice of a flat buffer, a view."""
        numel = full.numel() // self.world_size
        return full.narrow(0, self.rank * numel, numel)

    def gather(self, full: Tensor) -> Pending:
        """All-gather in place: every rank's own slice of ``full`` (flat) reaches all ranks, bit for bit."""
        if self.world_size == 1:
            return _DONE
        raw = full.view(torch.uint8)
        if not self._exchange:
            with self.explains():
                return self._works([_all_gather(raw, self.shard_of(raw), group=self._gathers, async_op=True)])
        # gloo's own all-gather takes twice the time of sends and receives straight into place
        slices = raw.chunk(self.world_size)
        return self._works(self._swap(self._gathers, lambda _: slices[self.rank], lambda peer: slices[peer]))

    def exchange_marks(self, mark: int, room: int) -> list[int]:
        """Tells the other ranks which buffer this one is about to gather, where gloo would crash if they differed.

        A message that is longer than the buffer it arrives in ends a gloo process without a word, so what is not as
        long as most has to be announced; a mark may also meet a whole slice of another buffer.

        Args:
            mark: an int32 that identifies the buffer.
            room: bytes of the longest slice that may come in a mark's place.

        Returns:
            what came from the others, marks if all goes well; nothing on other backends than gloo.
        """
        if not self._exchange:
            return []
        own = torch.tensor([mark], dtype=torch.int32)
        received = {r: torch.empty(max(room, 4), dtype=torch.uint8) for r in range(self.world_size) if r != self.rank}
        self._works(self._swap(self._gathers, lambda _: own.view(torch.uint8), lambda peer: received[peer])).wait()
        return [int(found[:4].view(torch.int32).item()) for found in received.values()]

    def reduce_scatter(self, full: Tensor, out: Tensor, scratch: Tensor | None) -> Pending:
        """Sums ``full`` (flat) over the ranks; ``out`` gets this rank's slice.

        Both must stay untouched until the wait. The sum runs in rank order, so it is the same in every run.

        Args:
            scratch: flat, as many elements and the dtype of :meth:`scratch_numel`, or ``None`` if that is 0.
        """
        if self.world_size == 1:
            out.copy_(full)
            return _DONE
        if not self._exchange:
            with self.explains():
                return self._works([_reduce_scatter(out, full, group=self._reduces, async_op=True)])
        # gloo's own reduce-scatter all-reduces the whole buffer: seven times slower than this exchange
        assert scratch is not None
        slices = list(full.chunk(self.world_size))
        received = list(scratch.chunk(self.world_size - 1))
        received.insert(self.rank, slices[self.rank])
        works = self._swap(self._reduces, lambda peer: slices[peer], lambda peer: received[peer])

        def add_up() -> None:
            torch.add(received[0], received[1], out=out)
            for part in received[2:]:
                out.add_(part)

        return _Works(works, add_up, self.explains, self._waiter)

    def scratch_numel(self, full_numel: int) -> int:
        """Elements of scratch space that :meth:`reduce_scatter` wants for a buffer of ``full_numel`` elements."""
        return full_numel - full_numel // self.world_size if self._exchange else 0

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduces ``tensor`` in place by summation and returns it."""
        if self.world_size > 1:
            with self.explains():
                dist.all_reduce(tensor, group=self._gathers)
        return tensor

    def sum_reduced(self, tensor: Tensor) -> Pending:
        """Starts to all-reduce ``tensor`` in place by summation, in one order with the reduce-scatters."""
        if self.world_size == 1:
            return _DONE
        with self.explains():
            return self._works([dist.all_reduce(tensor, group=self._reduces, async_op=True)])

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrites ``tensor`` (contiguous) with rank 0's and returns it."""
        if self.world_size > 1:
            with self.explains():
                dist.broadcast(tensor, group=self._gathers, group_src=0)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value``, which must be picklable, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        with self.explains():
            dist.broadcast_object_list(box, group=self._gathers, group_src=0)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's ``value``, which must be picklable, on every rank, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.explains():
            dist.all_gather_object(values, value, group=self._gathers)
        return values

    @contextmanager
    def explains(self) -> Iterator[None]:
        """Around whatever waits for the ranks of the group, in this package or not.

        Raises:
            PeerError: it failed because another rank did; with that rank's own word.
            StateError: the ranks have parted.
        """
        if self._parted:
            raise StateError("a rank has failed and the ranks have parted; nothing can be exchanged any more")
        with self._board.explains() if self._board is not None else nullcontext():
            yield

    def leave(self, word: str) -> None:
        """This rank cannot go on: leaves ``word`` for the others and closes its connections, so that none waits for it.

        On gloo only, where a wait for a closed connection ends. Under NCCL the others wait inside the device, until
        their process group's timeout or their launcher ends them.
        """
        if self._board is None or self._parted:
            return
        self._board.post(word)
        self._parted = True
        groups, self._gathers, self._reduces = {self._gathers, self._reduces}, None, None
        for group in groups - {dist.group.WORLD} if self._exchange else ():
            dist.destroy_process_group(group)

    def close(self) -> None:
        """Nothing will be exchanged any more."""
        if self._waiter is not None:
            self._waiter.close()

    def _works(self, works: Sequence[dist.Work], then: Callable[[], None] | None = None) -> Pending:
        return _Works(works, then, self.explains)

    def _swap(
        self, group: dist.ProcessGroup | None, send: Callable[[int], Tensor], receive: Callable[[int], Tensor]
    ) -> list[dist.Work]:
        """Starts the exchange of one tensor with each other rank."""
        works: list[dist.Work | None] = []
        with self.explains():
            for distance in range(1, self.world_size):
                to, source = (self.rank + distance) % self.world_size, (self.rank - distance) % self.world_size
                works.append(dist.isend(send(to), group=group, group_dst=to))
                works.append(dist.irecv(receive(source), group=group, group_src=source))
        return [work for work in works if work is not None]


class _Works:
    """Works of one collective.

    Args:
        then: what is left to do when all have come.
        explains: around the wait.
        waiter: waits in the background, for a backend that cannot say whether a send or a receive is over (gloo).
    """

    def __init__(
        self,
        works: Sequence[dist.Work],
        then: Callable[[], None] | None = None,
        explains: Callable[[], AbstractContextManager[None]] = nullcontext,
        waiter: Worker | None = None,
    ) -> None:
        self._works = works
        self._then = then
        self._explains = explains
        self._waited: Future[None] | None = None if waiter is None else waiter.submit(self._wait_for_all)

    def done(self, seconds: float) -> bool:
        if self._waited is not None:
            return bool(wait([self._waited], seconds).done)
        deadline = time.monotonic() + seconds
        while not (over := all(work.is_completed() for work in self._works)) and time.monotonic() < deadline:
            time.sleep(1e-3)
        return over

    def wait(self) -> None:
        with self._explains():
            if self._waited is not None:
                self._waited.result()
            else:
                self._wait_for_all()
        if self._then is not None:
            self._then()

    def _wait_for_all(self) -> None:
        for work in self._works:
            work.wait()


_DONE = _Works(())


_boards: Counter[str] = Counter()


def _new_board(group: dist.ProcessGroup) -> Board:
    """A board of its own for each user of a group; all ranks make theirs in the same order."""
    name = f"lightning_gemini/{_boards[group.group_name]}"
    _boards[group.group_name] += 1
    return Board(PrefixStore(name, group.get_group_store()), dist.get_rank(group), dist.get_world_size(group))
