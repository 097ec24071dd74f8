"""All chunks: moves their bytes on command and counts them; decides nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_gemini.core.agree import TagBook, chunk_tag
from lightning_gemini.core.chunk import Chunk, Home
from lightning_gemini.core.collectives import Collectives, Pending
from lightning_gemini.core.layout import Layout
from lightning_gemini.core.memory import Tier
from lightning_gemini.optim.masters import round_to_compute


@dataclass
class Counters:
    """What has been moved since the engine was made; exact, so that tests can assert it."""

    unshards: int = 0  #: chunks made resident
    reshards: int = 0  #: chunks freed
    gathered_bytes: int = 0  #: bytes that arrived from other ranks in unshards and refreshes
    fetched_bytes: int = 0  #: bytes copied from the host tier to the device
    offloaded_bytes: int = 0  #: bytes copied from the device to the host tier
    reduces: int = 0  #: reduce-scatters of a chunk's gradients
    reduced_bytes: int = 0  #: bytes that this rank sent for them
    updates: int = 0  #: chunks that an optimizer step has changed


class Store:
    """The chunks of a layout, on their tiers.

    Args:
        layout: the plan that all ranks share.
        params: the parameters of ``layout.params``, in that order; they are bound to the chunks.
        homes: where the shard of each chunk lives.
        masters: the chunks that have an fp32 master weight, zero until it is written.
    """

    def __init__(
        self,
        layout: Layout,
        params: Sequence[nn.Parameter],
        homes: Sequence[Home],
        masters: Collection[int],
        collectives: Collectives,
        device: Tier,
        host: Tier,
    ) -> None:
        self.layout = layout
        self.device = device
        self.host = host
        self.collectives = collectives
        self.counters = Counters()
        self.tags = TagBook(layout, device.device)
        self.chunks: list[Chunk] = []
        self.masters: dict[int, Tensor] = {}
        for spec, home in zip(layout.chunks, homes, strict=True):
            nbytes = spec.nbytes if home is Home.FULL else spec.nbytes // layout.world_size
            (host if home is Home.HOST else device).take(nbytes, f"the shard of chunk {spec.index}")
            chunk = Chunk(
                spec,
                [layout.params[slot.param] for slot in spec.slots],
                [params[slot.param] for slot in spec.slots],
                home,
                collectives.rank,
                layout.world_size,
                device.device,
                host.device,
            )
            if home is Home.FULL:
                chunk.tag.fill_(chunk_tag(layout, spec.index))
            elif collectives.rank == layout.world_size - 1:
                chunk.shard.view(torch.uint8)[-4:].view(torch.int32).fill_(chunk_tag(layout, spec.index))
            self.chunks.append(chunk)
            if spec.index in masters:
                tier = self.master_tier(chunk)
                tier.take(chunk.shard.numel() * 4, f"the master weights of chunk {spec.index}")
                with torch.inference_mode(False):
                    self.masters[spec.index] = torch.zeros(chunk.shard.numel(), device=tier.device)

    def unshard(self, chunk: Chunk, reason: str) -> None:
        """FREE -> HELD: allocates, fills this rank's slice and gathers the others'.

        Raises:
            OutOfBudgetError: it does not fit the device tier.
            DisagreementError: another rank gathered another chunk; ``reason`` names the unit that wanted this one.
        """
        self.device.take(chunk.spec.nbytes, f"chunk {chunk.index} for {reason}")
        chunk.allocate()
        try:
            chunk.own.copy_(chunk.shard)
            self._gather(chunk).wait()
            if self.layout.world_size > 1:
                self.tags.note(chunk.index, chunk.tag, reason)
        except BaseException:
            chunk.full.untyped_storage().resize_(0)
            self.device.give(chunk.spec.nbytes)
            raise
        chunk.hold()
        if chunk.home is Home.HOST:
            self.counters.fetched_bytes += chunk.shard.nbytes
        self.counters.unshards += 1

    def reshard(self, chunk: Chunk) -> None:
        """HELD -> FREE; nothing is copied, the shard holds the same values."""
        chunk.free()
        self.device.give(chunk.spec.nbytes)
        self.counters.reshards += 1

    def refresh(self, chunk: Chunk) -> Pending:
        """Starts to bring the other ranks' updated shards into a chunk that is never freed."""
        return self._gather(chunk)

    def write(self, param: int, value: Tensor) -> None:
        """Stores a whole parameter; every rank has the same ``value`` and keeps what it owns of it.

        Args:
            param: index into ``layout.params``.
            value: the parameter's shape, on any device, any dtype that converts to the chunk's.
        """
        index, slot = self.layout.place(param)
        chunk, stride = self.chunks[index], self.layout.params[param].stride
        mine = self.owned(index, slot.offset, slot.end)
        first = self.collectives.rank * chunk.shard.numel() + mine.start - slot.offset
        master = self.masters.get(index)
        if master is None:
            flat = flatten_like(value.detach(), stride, chunk.full.dtype)
        else:
            wide = flatten_like(value.detach(), stride, master.dtype)
            master[mine.start : mine.stop].copy_(wide[first : first + len(mine)])
            flat = round_to_compute(wide, torch.empty(wide.shape, dtype=chunk.full.dtype, device=wide.device))
        if chunk.home is Home.FULL:
            chunk.full[slot.offset : slot.end].copy_(flat)
        else:
            chunk.shard[mine.start : mine.stop].copy_(flat[first : first + len(mine)])

    def read(self, index: int) -> Tensor:
        """The whole of chunk number ``index`` as the optimizer sees it: the master where there is one, else the chunk.

        Flat, a copy, on the device; all ranks take part.
        """
        return self.assemble(index, self.masters.get(index, self.chunks[index].shard))

    def assemble(self, index: int, shard: Tensor) -> Tensor:
        """Gathers something that is sharded like chunk number ``index``, such as an optimizer state.

        Args:
            shard: ``layout.shard_numel(index)`` elements of any dtype.

        Returns:
            a new flat tensor on the device; all ranks take part.
        """
        numel = self.layout.chunks[index].numel
        with torch.inference_mode(False):
            full = torch.empty(numel, dtype=shard.dtype, device=self.device.device)
        self.collectives.shard_of(full).copy_(shard)
        self.collectives.gather(full).wait()
        return full

    def master_tier(self, chunk: Chunk) -> Tier:
        """Where the chunk's master lives: with the shard, if an optimizer needs it, else out of the way."""
        return self.host if chunk.home is Home.HOST or not chunk.spec.kind.updated else self.device

    def owned(self, chunk: int, start: int, stop: int) -> range:
        """The part of ``start:stop`` of a chunk that this rank owns, counted from its shard's beginning."""
        numel = self.layout.shard_numel(chunk)
        low = self.collectives.rank * numel
        first = min(max(start - low, 0), numel)
        return range(first, max(first, min(stop - low, numel)))

    def release(self) -> None:
        """Gives all counted memory back; the store is of no use afterwards."""
        for chunk in self.chunks:
            if chunk.resident and chunk.home is not Home.FULL:
                self.device.give(chunk.spec.nbytes)
            tier = self.host if chunk.home is Home.HOST else self.device
            tier.give(chunk.spec.nbytes if chunk.home is Home.FULL else chunk.shard.nbytes)
        for index, master in self.masters.items():
            self.master_tier(self.chunks[index]).give(master.nbytes)
        self.chunks.clear()
        self.masters.clear()

    def _gather(self, chunk: Chunk) -> Pending:
        self.counters.gathered_bytes += chunk.spec.nbytes - chunk.own.nbytes
        return self.collectives.gather(chunk.full)


def flatten_like(value: Tensor, stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``value`` as 1-d in the memory order that ``stride`` (dense) describes, in ``dtype``."""
    if tuple(value.stride()) != tuple(stride) or value.dtype != dtype:
        ordered = torch.empty_strided(tuple(value.shape), tuple(stride), dtype=dtype, device=value.device)
        value = ordered.copy_(value)
    return value.as_strided((value.numel(),), (1,))
