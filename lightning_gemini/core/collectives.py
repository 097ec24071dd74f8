"""The one file that calls torch.distributed.

Two process groups, because the order of gathers and the order of reductions are agreed separately: gathers follow the
units, reductions follow the layout, and how the two interleave may differ from rank to rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed the two and warns on the old names; 2.11 has the old names only.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(Protocol):
    """A collective under way; ``wait`` may be called once."""

    def wait(self) -> None: ...


class Collectives:
    """Collectives on flat buffers for the ranks of one group; all of them local where there is one rank.

    Args:
        group: the ranks that share the chunks; ``None`` for a single process.
        reduce_group: the same ranks in a group of its own for reduce-scatters; ``group`` if not given.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, reduce_group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._reduce_group = reduce_group or group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self._exchange = group is not None and dist.get_backend(group) == "gloo"

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
            return _Works([_all_gather(raw, self.shard_of(raw), group=self._group, async_op=True)])
        # gloo's own all-gather takes twice the time of sends and receives straight into place
        slices = raw.chunk(self.world_size)
        return _Works(_swap(self._group, self.rank, lambda _: slices[self.rank], lambda peer: slices[peer]))

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
            return _Works([_reduce_scatter(out, full, group=self._reduce_group, async_op=True)])
        # gloo's own reduce-scatter all-reduces the whole buffer: seven times slower than this exchange
        assert scratch is not None
        slices = list(full.chunk(self.world_size))
        received = list(scratch.chunk(self.world_size - 1))
        received.insert(self.rank, slices[self.rank])
        works = _swap(self._reduce_group, self.rank, lambda peer: slices[peer], lambda peer: received[peer])

        def add_up() -> None:
            torch.add(received[0], received[1], out=out)
            for part in received[2:]:
                out.add_(part)

        return _Works(works, add_up)

    def scratch_numel(self, full_numel: int) -> int:
        """Elements of scratch space that :meth:`reduce_scatter` wants for a buffer of ``full_numel`` elements."""
        return full_numel - full_numel // self.world_size if self._exchange else 0

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduces ``tensor`` in place by summation and returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrites ``tensor`` (contiguous) with rank 0's and returns it."""
        if self.world_size > 1:
            dist.broadcast(tensor, group=self._group, group_src=0)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value``, which must be picklable, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's ``value``, which must be picklable, on every rank, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


class _Works:
    def __init__(self, works: Sequence[dist.Work], then: Callable[[], None] | None = None) -> None:
        self._works = works
        self._then = then

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        if self._then is not None:
            self._then()


_DONE = _Works(())


def _swap(
    group: dist.ProcessGroup | None,
    rank: int,
    send: Callable[[int], Tensor],
    receive: Callable[[int], Tensor],
) -> list[dist.Work]:
    """Starts the exchange of one tensor with each other rank."""
    world_size = dist.get_world_size(group)
    works: list[dist.Work | None] = []
    for distance in range(1, world_size):
        to, source = (rank + distance) % world_size, (rank - distance) % world_size
        works.append(dist.isend(send(to), group=group, group_dst=to))
        works.append(dist.irecv(receive(source), group=group, group_src=source))
    return [work for work in works if work is not None]
