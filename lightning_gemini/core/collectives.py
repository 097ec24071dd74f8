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
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from lightning_gemini.core.errors import GeminiError, PeerError, StateError
from lightning_gemini.core.hang import Hang
from lightning_gemini.core.peers import Board
from lightning_gemini.core.pulse import Pulse
from lightning_gemini.core.watchdog import Watchdog
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
        hang_folder: where a rank that waits for others in vain writes down where it stood (see ``hang``).

    Attributes:
        pulse: what this rank is doing, for whoever wants to know whether it goes on.
        parted: whether this rank has left the others; nothing can be exchanged any more.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        reduce_group: dist.ProcessGroup | None = None,
        hang_folder: Path = Path(),
    ) -> None:
        self._gathers = group
        self._reduces = reduce_group or group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self._exchange = group is not None and dist.get_backend(group) == "gloo"
        self.pulse = Pulse()
        self._board = None if group is None else _new_board(group)
        self._hang = None
        if self._board is not None:
            timeout = min(_timeout_seconds(g) for g in (self._gathers, self._reduces) if g is not None)
            self._hang = Hang(self.pulse, self._board, timeout, hang_folder, dist.get_rank())
        self._watchdog: Watchdog | None = None
        self.parted = False
        self._waiter = Worker("gemini-wait") if self._exchange else None

    def shard_of(self, full: Tensor) -> Tensor:
        """This rank's slice of a flat buffer, a view."""
        numel = full.numel() // self.world_size
        return full.narrow(0, self.rank * numel, numel)

    def watch(self) -> None:
        """Begins to watch for a rank that makes no progress, if there are several; :meth:`close` ends it."""
        if self._hang is not None and self.world_size > 1:
            self._watchdog = Watchdog(self.pulse, self._hang)
            self._watchdog.start()

    def gather(self, full: Tensor, what: str = "a buffer") -> Pending:
        """All-gather in place: every rank's own slice of ``full`` (flat) reaches all ranks, bit for bit."""
        if self.world_size == 1:
            return _DONE
        label, raw = f"an all-gather of {what}", full.view(torch.uint8)
        if not self._exchange:
            with self._beginning(label):
                work = _all_gather(raw, self.shard_of(raw), group=self._gathers, async_op=True)
            return self._works([work], label)
        # gloo's own all-gather takes twice the time of sends and receives straight into place
        slices = raw.chunk(self.world_size)
        return self._works(
            self._swap(self._gathers, lambda _: slices[self.rank], lambda peer: slices[peer], label), label
        )

    def exchange_marks(self, mark: int, room: int, what: str = "a buffer") -> list[int]:
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
        label = f"the announcement of {what}"
        works = self._swap(self._gathers, lambda _: own.view(torch.uint8), lambda peer: received[peer], label)
        self._works(works, label).wait()
        return [int(found[:4].view(torch.int32).item()) for found in received.values()]

    def reduce_scatter(self, full: Tensor, out: Tensor, scratch: Tensor | None, what: str = "a buffer") -> Pending:
        """Sums ``full`` (flat) over the ranks; ``out`` gets this rank's slice.

        Both must stay untouched until the wait. The sum runs in rank order, so it is the same in every run.

        Args:
            scratch: flat, as many elements and the dtype of :meth:`scratch_numel`, or ``None`` if that is 0.
        """
        if self.world_size == 1:
            out.copy_(full)
            return _DONE
        label = f"a reduce-scatter of {what}"
        if not self._exchange:
            with self._beginning(label):
                work = _reduce_scatter(out, full, group=self._reduces, async_op=True)
            return self._works([work], label)
        # gloo's own reduce-scatter all-reduces the whole buffer: seven times slower than this exchange
        assert scratch is not None
        slices = list(full.chunk(self.world_size))
        received = list(scratch.chunk(self.world_size - 1))
        received.insert(self.rank, slices[self.rank])
        works = self._swap(self._reduces, lambda peer: slices[peer], lambda peer: received[peer], label)

        def add_up() -> None:
            torch.add(received[0], received[1], out=out)
            for part in received[2:]:
                out.add_(part)

        return _Works(works, add_up, partial(self.explains, label), self._waiter)

    def scratch_numel(self, full_numel: int) -> int:
        """Elements of scratch space that :meth:`reduce_scatter` wants for a buffer of ``full_numel`` elements."""
        return full_numel - full_numel // self.world_size if self._exchange else 0

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduces ``tensor`` in place by summation and returns it."""
        if self.world_size > 1:
            with self._beginning(f"an all-reduce of {tensor.numel()} numbers"):
                dist.all_reduce(tensor, group=self._gathers)
        return tensor

    def sum_reduced(self, tensor: Tensor) -> Pending:
        """Starts to all-reduce ``tensor`` in place by summation, in one order with the reduce-scatters."""
        if self.world_size == 1:
            return _DONE
        label = f"an all-reduce of {tensor.numel()} numbers beside reduce-scatters"
        with self._beginning(label):
            work = dist.all_reduce(tensor, group=self._reduces, async_op=True)
        return self._works([work], label)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrites ``tensor`` (contiguous) with rank 0's and returns it."""
        if self.world_size > 1:
            with self._beginning(f"a broadcast of {tensor.numel()} numbers"):
                dist.broadcast(tensor, group=self._gathers, group_src=0)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value``, which must be picklable, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        with self._beginning("a broadcast of an object"):
            dist.broadcast_object_list(box, group=self._gathers, group_src=0)
        return box[0]

    def gather_objects(self, value: Any, what: str = "objects") -> list[Any]:
        """Every rank's ``value``, which must be picklable, on every rank, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._beginning(f"an exchange of {what}"):
            dist.all_gather_object(values, value, group=self._gathers)
        return values

    @contextmanager
    def explains(self, what: str = "a collective") -> Iterator[None]:
        """Around whatever waits for the ranks of the group, in this package or not; ``what`` it waits for.

        Raises:
            PeerError: it failed because another rank did, with that rank's own word; or because it took longer than
                the group's timeout, with where the other ranks are, as far as that is known, and the path of a file
                that says where this one is. All that comes after it fails with the same words.
            StateError: the ranks have parted.
        """
        if self.parted:
            raise StateError("a rank has failed and the ranks have parted; nothing can be exchanged any more")
        if self._hang is None:
            yield
            return
        if self._hang.broken is not None:
            raise PeerError(self._hang.broken)
        began, block = time.monotonic(), self.pulse.enter(what)
        try:
            yield
        except (GeminiError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            raise PeerError(self._hang.explain(error, what, time.monotonic() - began)) from error
        finally:
            self.pulse.leave(block)

    def leave(self, word: str) -> None:
        """This rank cannot go on: leaves ``word`` for the others and closes its connections, so that none waits for it.

        On gloo only, where a wait for a closed connection ends. Under NCCL the others wait inside the device, until
        their process group's timeout or their launcher ends them.
        """
        if self._board is None or self.parted:
            return
        self._board.post(word)
        self.parted = True
        self._stop_watching()
        groups, self._gathers, self._reduces = {self._gathers, self._reduces}, None, None
        for group in groups - {dist.group.WORLD} if self._exchange else ():
            dist.destroy_process_group(group)

    def close(self) -> None:
        """Nothing will be exchanged any more."""
        self._stop_watching()
        if self._waiter is not None:
            self._waiter.close()

    def _stop_watching(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None

    def _beginning(self, label: str) -> AbstractContextManager[None]:
        self.pulse.begin(label)
        return self.explains(label)

    def _works(self, works: Sequence[dist.Work], label: str) -> Pending:
        return _Works(works, None, partial(self.explains, label))

    def _swap(
        self,
        group: dist.ProcessGroup | None,
        send: Callable[[int], Tensor],
        receive: Callable[[int], Tensor],
        label: str,
    ) -> list[dist.Work]:
        """Starts the exchange of one tensor with each other rank."""
        works: list[dist.Work | None] = []
        try:
            with self._beginning(label):
                for distance in range(1, self.world_size):
                    to, source = (self.rank + distance) % self.world_size, (self.rank - distance) % self.world_size
                    works.append(dist.isend(send(to), group=group, group_dst=to))
                    works.append(dist.irecv(receive(source), group=group, group_src=source))
        except BaseException:
            works.clear()  # see _Works
            raise
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
        self._works = list(works)
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
        try:
            with self._explains():
                if self._waited is not None:
                    self._waited.result()
                else:
                    self._wait_for_all()
        finally:
            self._works = []
        if self._then is not None:
            self._then()

    def _wait_for_all(self) -> None:
        works = self._works
        try:
            while works:
                works[-1].wait()
                works.pop()
        except BaseException:
            works.clear()  # one that lives, as in this traceback, would write into memory that is about to be freed
            raise


_DONE = _Works(())


def _timeout_seconds(group: dist.ProcessGroup) -> float:
    """How long a wait in ``group`` may take."""
    found = []
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if (timeout := getattr(options, "_timeout", None)) is not None:
            found.append(timeout.total_seconds())
    return min(found, default=dist.default_pg_timeout.total_seconds())


_boards: Counter[str] = Counter()


def _new_board(group: dist.ProcessGroup) -> Board:
    """A board of its own for each user of a group; all ranks make theirs in the same order."""
    name = f"lightning_gemini/{_boards[group.group_name]}"
    _boards[group.group_name] += 1
    # a connection of its own, so that a long wait in another thread does not hold up what is said
    store = PrefixStore(name, group.get_group_store()).clone()  # type: ignore[attr-defined]
    return Board(store, dist.get_rank(group), dist.get_world_size(group))
