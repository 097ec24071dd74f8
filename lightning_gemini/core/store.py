"""All chunks: moves their bytes on command and counts them; decides nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_gemini.core.agree import TagBook, chunk_tag
from lightning_gemini.core.chunk import Chunk, Home
from lightning_gemini.core.collectives import Collectives, Pending
from lightning_gemini.core.dtypes import DtypePolicy
from lightning_gemini.core.layout import Layout, Slot, tag_numel
from lightning_gemini.core.masters import Master
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
    skipped: int = 0  #: steps that were not taken because of gradients that are not finite


class Store:
    """The chunks of a layout, on their tiers.

    Args:
        layout: the plan that all ranks share.
        params: the parameters of ``layout.params``, in that order; they are bound to the chunks.
        homes: where the shard of each chunk lives.
        masters: the chunks that have an fp32 master weight, zero until it is written.
        policy: the dtypes; it says which chunks want a master when an optimizer first updates them.
    """

    def __init__(
        self,
        layout: Layout,
        params: Sequence[nn.Parameter],
        homes: Sequence[Home],
        masters: Collection[int],
        policy: DtypePolicy,
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
        sizes = [chunk.nbytes for chunk in layout.chunks]
        self._common_nbytes = max(set(sizes), key=lambda nbytes: (sizes.count(nbytes), nbytes))
        self._longest_slice = max(sizes) // layout.world_size
        self.chunks: list[Chunk] = []
        self.masters: dict[int, Master] = {}
        self._policy = policy
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
                # where no step needs it now, out of the way
                tier = self.tier_of(chunk) if spec.kind.trainable and spec.kind.updated else host
                self.masters[spec.index] = self._new_master(chunk, tier)

    def unshard(self, chunk: Chunk, reason: str) -> None:
        """FREE -> HELD: allocates, fills this rank's slice and gathers the others'.

        Raises:
            OutOfBudgetError: it does not fit the device tier.
            DisagreementError: another rank gathered another chunk; ``reason`` names the unit that wanted this one.
        """
        self.device.take(chunk.spec.nbytes, f"chunk {chunk.index} for {reason}")
        chunk.allocate()
        try:
            self.fill(chunk, reason)
        except BaseException:
            chunk.full.untyped_storage().resize_(0)
            self.device.give(chunk.spec.nbytes)
            raise
        chunk.hold()
        self.counters.unshards += 1

    def fill(self, chunk: Chunk, reason: str) -> None:
        """Brings this rank's shard and the others' into a chunk that has its memory.

        Raises:
            DisagreementError: see :meth:`unshard`.
        """
        if self.layout.world_size > 1:
            chunk.tag.zero_()  # whatever was here before must not pass for what did not come
            if chunk.spec.nbytes != self._common_nbytes:
                for found in self.collectives.exchange_marks(chunk_tag(self.layout, chunk.index), self._longest_slice):
                    self.tags.compare(chunk.index, found, reason)
        chunk.own.copy_(chunk.shard)
        self._gather(chunk).wait()
        if self.layout.world_size > 1:
            self.tags.note(chunk.index, chunk.tag, reason)
        if chunk.home is Home.HOST:
            self.counters.fetched_bytes += chunk.shard.nbytes

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
        master, mine = self.masters.get(index), self.owned(index, slot.offset, slot.end)
        flat = flatten_like(value.detach(), stride, chunk.full.dtype if master is None else torch.float32)
        if chunk.home is Home.FULL:
            place = chunk.full[slot.offset : slot.end]
            place.copy_(flat) if master is None else round_to_compute(flat, place)
        self.put(chunk, mine.start, self.own_part(index, slot, flat))

    def own_range(self, index: int, slot: Slot) -> range:
        """Which elements of a whole parameter this rank owns, in the order of its memory."""
        mine = self.owned(index, slot.offset, slot.end)
        first = self.collectives.rank * self.layout.shard_numel(index) + mine.start - slot.offset
        return range(first, first + len(mine))

    def own_part(self, index: int, slot: Slot, flat: Tensor) -> Tensor:
        """What this rank owns of a whole parameter; ``flat`` holds all of it, in the order of its memory."""
        mine = self.own_range(index, slot)
        return flat[mine.start : mine.stop]

    def copy_own(self, index: int, slot: Slot, flat: Tensor, shard: Tensor) -> None:
        """Copies :meth:`own_part` to its place in ``shard``, which is sharded like chunk number ``index``."""
        mine = self.owned(index, slot.offset, slot.end)
        shard[mine.start : mine.stop].copy_(self.own_part(index, slot, flat))

    def truth(self, chunk: Chunk) -> Tensor:
        """This rank's part of the weights as they count: the master's values where there is one, else the shard."""
        master = self.masters.get(chunk.index)
        return chunk.shard if master is None else master.values(chunk.shard)

    def put(self, chunk: Chunk, start: int, values: Tensor) -> None:
        """Stores ``values`` (1-d, of the dtype of :meth:`truth`) as this rank's weights from element ``start`` on.

        Where they reach to the end of the shard, the tag stays as it is.
        """
        last = self.collectives.rank == self.layout.world_size - 1
        room = chunk.shard.numel() - start - (tag_numel(chunk.shard.dtype) if last else 0)
        values = values[:room]
        master = self.masters.get(chunk.index)
        if master is None:
            chunk.shard[start : start + len(values)].copy_(values)
        else:
            master.put(chunk.shard, start, values.to(master.part.device))

    def tier_of(self, chunk: Chunk) -> Tier:
        """Where the chunk's shard and what goes with it live."""
        return self.host if chunk.home is Home.HOST else self.device

    def read(self, index: int) -> Tensor:
        """The whole of chunk number ``index`` as the optimizer sees it: the master where there is one, else the chunk.

        Flat, a copy, on the device; all ranks take part.
        """
        return self.assemble(index, self.truth(self.chunks[index]))

    def assemble(self, index: int, shard: Tensor) -> Tensor:
        """Gathers something that is sharded like chunk number ``index``, such as an optimizer state.

        Args:
            shard: 1-d, of any dtype: ``layout.shard_numel(index)`` elements, or one for each block of them.

        Returns:
            a new flat tensor on the device; all ranks take part.
        """
        numel = self.layout.chunks[index].numel * len(shard) // self.layout.shard_numel(index)
        with torch.inference_mode(False):
            full = torch.empty(numel, dtype=shard.dtype, device=self.device.device)
        self.collectives.shard_of(full).copy_(shard)
        self.collectives.gather(full).wait()
        return full

    def bring_master(self, chunk: Chunk) -> Master | None:
        """The chunk's master, beside its shard; a chunk that was frozen gets it now, or has it brought near."""
        if not self._policy.needs_master(chunk.spec.kind.dtype):
            return None
        tier, known = self.tier_of(chunk), self.masters.get(chunk.index)
        if known is None or known.tier is not tier:
            near = self._new_master(chunk, tier)
            values = self.truth(chunk).to(tier.device, torch.float32)
            self.masters[chunk.index] = near
            self.put(chunk, 0, values)
            if known is not None:
                known.release()
        return self.masters[chunk.index]

    def _new_master(self, chunk: Chunk, tier: Tier) -> Master:
        assert self._policy.master is not None
        what = f"the master weights of chunk {chunk.index}"
        return Master(self._policy.master, chunk.shard.numel(), tier, what)

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
            self.tier_of(chunk).give(chunk.spec.nbytes if chunk.home is Home.FULL else chunk.shard.nbytes)
        for master in self.masters.values():
            master.release()
        self.chunks.clear()
        self.masters.clear()
        self.collectives.close()

    def _gather(self, chunk: Chunk) -> Pending:
        self.counters.gathered_bytes += chunk.spec.nbytes - chunk.own.nbytes
        return self.collectives.gather(chunk.full)


def flatten_like(value: Tensor, stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``value`` as 1-d in the memory order that ``stride`` (dense) describes, in ``dtype``."""
    if tuple(value.stride()) != tuple(stride) or value.dtype != dtype:
        ordered = torch.empty_strided(tuple(value.shape), tuple(stride), dtype=dtype, device=value.device)
        value = ordered.copy_(value)
    return value.as_strided((value.numel(),), (1,))
