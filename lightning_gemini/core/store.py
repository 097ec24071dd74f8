"""All chunks: moves their bytes on command and counts them; decides nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_gemini.core.agree import TagBook, chunk_tag
from lightning_gemini.core.arrivals import Arrivals
from lightning_gemini.core.chunk import Chunk, Home
from lightning_gemini.core.collectives import Collectives, Pending
from lightning_gemini.core.cores import HostThreads
from lightning_gemini.core.counters import Counters
from lightning_gemini.core.dtypes import DtypePolicy
from lightning_gemini.core.footprint import trained
from lightning_gemini.core.host_updates import HostUpdates
from lightning_gemini.core.layout import ChunkSpec, Layout, Slot, tag_numel
from lightning_gemini.core.masters import Master
from lightning_gemini.core.memory import Tier
from lightning_gemini.core.slabs import Slabs
from lightning_gemini.core.streams import Stopwatch, lanes
from lightning_gemini.optim.masters import round_to_compute


class Beside(Protocol):
    """Somebody who keeps something beside the shards of chunks, on the same tier."""

    def beside_bytes(self, chunk: Chunk) -> int:
        """How much that is for one chunk."""

    def move(self, chunk: Chunk, tier: Tier) -> None:
        """Moves it to the tier where the chunk's home is about to be; there is room."""


class Store:
    """The chunks of a layout, on their tiers.

    Args:
        layout: the plan that all ranks share.
        params: the parameters of ``layout.params``, in that order; they are bound to the chunks.
        homes: where the shard of each chunk lives.
        masters: the chunks that have an fp32 master weight, zero until it is written.
        policy: the dtypes; it says which chunks want a master when an optimizer first updates them. Also an attribute.
        threads: of updates in the background, ``None`` for no such updates.

    Attributes:
        host_updates: the updates that are made in the background.
        arrivals: the chunks that are being filled.
        slabs: host memory of what is copied between the tiers.
        waits: how long units have waited for their chunks.
        unsharded_bytes: of the chunks that are unsharded now and may be freed.
        extra_bytes: what others keep beside a chunk's shard, by chunk.
        beside: who keeps something beside the chunks' shards, which has to move with them.
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
        threads: HostThreads | None,
    ) -> None:
        self.layout = layout
        self.device = device
        self.host = host
        self.collectives = collectives
        self.counters = Counters()
        self.fetching, self.offloading = lanes(device.device)
        self.slabs = Slabs(host, pin=device.device.type == "cuda")
        self.host_updates = HostUpdates(threads, self.slabs.put)
        self.waits = Stopwatch(device.device)
        self.unsharded_bytes = 0
        self.extra_bytes: Counter[int] = Counter()
        self.beside: list[Beside] = []
        self.tags = TagBook(layout, device.device)
        self.arrivals = Arrivals(layout, collectives, self.fetching, self.tags, self.counters)
        self.chunks: list[Chunk] = []
        self.masters: dict[int, Master] = {}
        self._aside: set[int] = set()  # masters that no step needs now, in host memory wherever their chunks live
        self.policy = policy
        pairs = list(zip(layout.chunks, homes, strict=True))
        hosted = [spec.nbytes // layout.world_size for spec, home in pairs if home is Home.HOST]
        self.slabs.reserve(hosted, "the shards of parameters")
        for spec, home in pairs:
            if home is Home.FULL:
                device.take(spec.nbytes, f"chunk {spec.index}")
            chunk = Chunk(
                spec,
                [layout.params[slot.param] for slot in spec.slots],
                [params[slot.param] for slot in spec.slots],
                home,
                None if home is Home.FULL else self._new_shard(spec, home),
                collectives.rank,
                layout.world_size,
                device.device,
            )
            if home is Home.FULL:
                chunk.tag.fill_(chunk_tag(layout, spec.index))
            elif collectives.rank == layout.world_size - 1:
                chunk.shard.view(torch.uint8)[-4:].view(torch.int32).fill_(chunk_tag(layout, spec.index))
            self.chunks.append(chunk)
            if spec.index in masters:
                if not trained(spec):
                    self._aside.add(spec.index)
                tier = host if spec.index in self._aside else self.tier_of(chunk)
                self.masters[spec.index] = self._new_master(chunk, tier)

    def start(self, chunk: Chunk, reason: str, ahead: bool = False) -> None:
        """FREE -> COMING: allocates, and begins to fill this rank's slice and to gather the others'.

        Args:
            reason: who needs the chunk, for people.
            ahead: whether nobody needs it yet, so that nothing is to be waited for.

        Raises:
            OutOfBudgetError: it does not fit the device tier.
            DisagreementError: another rank gathered another chunk; ``reason`` names the unit that wanted this one.
        """
        self._allocate(chunk, f"chunk {chunk.index} for {reason}")
        self.counters.unshards += 1
        try:
            self.arrivals.begin(chunk, reason, ahead)
        except BaseException:
            self.arrivals.forget(chunk)
            self.reshard(chunk)
            raise

    def finish(self, chunk: Chunk) -> None:
        """COMING -> HELD: what computes next waits until the chunk is filled.

        Raises:
            DisagreementError: see :meth:`start`.
            UpdateError: the chunk has no proper values.
        """
        try:
            self.arrivals.finish(chunk)
        except BaseException:
            self.arrivals.forget(chunk)
            self.reshard(chunk)
            raise
        chunk.hold()

    def refill(self, chunk: Chunk, reason: str) -> None:
        """Brings this rank's shard and the others' into an unsharded chunk once more.

        Raises:
            DisagreementError: see :meth:`start`.
        """
        self.arrivals.refill(chunk, reason)

    def abandon(self, chunk: Chunk) -> None:
        """COMING -> FREE, when what is under way is over, and if that raises DisagreementError; begins nothing."""
        try:
            self.arrivals.abandon(chunk)
        finally:
            self.reshard(chunk)

    def _allocate(self, chunk: Chunk, what: str) -> None:
        """FREE -> COMING, and counted."""
        self.device.take(chunk.spec.nbytes, what)
        try:
            chunk.allocate(self.device)
        except BaseException:
            self.device.give(chunk.spec.nbytes)
            raise
        self.unsharded_bytes += chunk.spec.nbytes

    def reshard(self, chunk: Chunk) -> None:
        """HELD or COMING -> FREE; nothing is copied, the shard holds the same values."""
        chunk.free()
        self.device.give(chunk.spec.nbytes)
        self.unsharded_bytes -= chunk.spec.nbytes
        self.counters.reshards += 1

    def refresh(self, chunk: Chunk) -> Pending:
        """Starts to bring the other ranks' updated shards into a chunk that is never freed."""
        return self.arrivals.gather(chunk, "its updated values")

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

    def rehome(self, chunk: Chunk, home: Home) -> None:
        """Moves a chunk's shard, and all that is kept beside it, to another home.

        From then on it is never freed (``FULL``), or as resident as it was.

        Raises:
            OutOfBudgetError: it does not fit there; nothing has moved.
        """
        if chunk.home is home:
            return
        _ = chunk.shard  # with what is kept beside it, it may be in the hands of an update
        self.fetching.mark().wait()  # a copy of a chunk that was dropped may still read what is given back here
        before, tier = chunk.home, self.host if home is Home.HOST else self.device
        away = tier is not self.tier_of(chunk)
        shard = self._move_all(chunk, home, tier) if away else self._copy_shard(chunk, home)
        self._give_shard(chunk)
        chunk.settle(home, shard)
        if Home.FULL in (before, home):  # it may be freed from now on, or no more
            self.unsharded_bytes += chunk.spec.nbytes * (1 if before is Home.FULL else -1)

    def _move_all(self, chunk: Chunk, home: Home, tier: Tier) -> Tensor:
        """Moves what is beside the shard to another tier, and copies the shard there; all of it or nothing."""
        master = None if chunk.index in self._aside else self.masters.get(chunk.index)
        total = chunk.shard.nbytes + sum(one.beside_bytes(chunk) for one in self.beside)
        total += 0 if master is None else master.part.nbytes
        tier.require(total, f"chunk {chunk.index} with its optimizer state")
        moved: list[Callable[[Tier], None]] = []
        try:
            for move in (*(partial(one.move, chunk) for one in self.beside), *((master.move,) if master else ())):
                move(tier)
                moved.append(move)
            shard = self._copy_shard(chunk, home)
        except BaseException:
            for move in reversed(moved):
                move(self.tier_of(chunk))
            raise
        self.counters.rehomed_bytes += total
        return shard

    def _copy_shard(self, chunk: Chunk, home: Home) -> Tensor:
        if home is not Home.FULL:
            return self._new_shard(chunk.spec, home).copy_(chunk.shard)
        if not chunk.resident:
            self._allocate(chunk, f"chunk {chunk.index}")
            chunk.own.copy_(chunk.shard)
            chunk.hold()
        return chunk.own

    def compact(self) -> None:
        """Gives back the host memory that shards have left, by moving those that lie in one slab with it.

        Nothing happens where there is no room for them a second time, for as long as that takes.
        """
        chunks = [chunk for chunk in self.chunks if chunk.home is Home.HOST]
        self.slabs.trim()
        if not self.slabs.free_bytes or not self.host.room(sum(chunk.own.nbytes for chunk in chunks)):
            return
        self.fetching.mark().wait()  # a copy may still read what is given back here
        old = [chunk.shard for chunk in chunks]
        self.slabs.reserve([shard.nbytes for shard in old], "the shards of parameters")
        for chunk in chunks:
            chunk.settle(Home.HOST, self._new_shard(chunk.spec, Home.HOST).copy_(chunk.shard))
        for shard in old:
            self.slabs.put(shard)
        self.slabs.trim()

    def _new_shard(self, spec: ChunkSpec, home: Home) -> Tensor:
        """Memory for the shard of a chunk at ``home``, which is not FULL; zeros."""
        numel, dtype = spec.numel // self.layout.world_size, spec.kind.dtype
        what = f"the shard of chunk {spec.index}"
        if home is Home.HOST:
            return self.slabs.get(numel, dtype, what).zero_()
        self.device.take(numel * dtype.itemsize, what)
        try:
            return self.device.empty(numel, dtype, what).zero_()
        except BaseException:
            self.device.give(numel * dtype.itemsize)
            raise

    def _give_shard(self, chunk: Chunk) -> None:
        if chunk.home is Home.HOST:
            self.slabs.put(chunk.shard)
        elif chunk.home is Home.DEVICE:
            self.device.give(chunk.shard.nbytes)

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
        full = self.device.empty(numel, shard.dtype, f"the whole of chunk {index}")
        self.collectives.shard_of(full).copy_(shard)
        self.collectives.gather(full, f"what belongs to chunk {index}").wait()
        return full

    def bring_master(self, chunk: Chunk) -> Master | None:
        """The chunk's master, beside its shard; a chunk that was frozen gets it now, or has it brought near."""
        if not self.policy.needs_master(chunk.spec.kind.dtype):
            return None
        tier, known = self.tier_of(chunk), self.masters.get(chunk.index)
        if known is not None:
            known.move(tier)
            self._aside.discard(chunk.index)
        else:
            values = chunk.shard.to(torch.float32)
            self.masters[chunk.index] = self._new_master(chunk, tier)
            self.put(chunk, 0, values)
        return self.masters[chunk.index]

    def _new_master(self, chunk: Chunk, tier: Tier) -> Master:
        assert self.policy.master is not None
        what = f"the master weights of chunk {chunk.index}"
        return Master(self.policy.master, chunk.shard.numel(), tier, what)

    def owned(self, chunk: int, start: int, stop: int) -> range:
        """The part of ``start:stop`` of a chunk that this rank owns, counted from its shard's beginning."""
        numel = self.layout.shard_numel(chunk)
        low = self.collectives.rank * numel
        first = min(max(start - low, 0), numel)
        return range(first, max(first, min(stop - low, numel)))

    def release(self) -> None:
        """Gives all counted memory back; the store is of no use afterwards."""
        for chunk in self.chunks:
            if chunk.resident or chunk.home is Home.FULL:
                self.device.give(chunk.spec.nbytes)
            self._give_shard(chunk)
        for master in self.masters.values():
            master.release()
        for lane in (self.fetching, self.offloading):
            lane.mark().wait()
        self.slabs.close()
        self.chunks.clear()
        self.masters.clear()
        self.collectives.close()


def flatten_like(value: Tensor, stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``value`` as 1-d in the memory order that ``stride`` (dense) describes, in ``dtype``."""
    if tuple(value.stride()) != tuple(stride) or value.dtype != dtype:
        ordered = torch.empty_strided(tuple(value.shape), tuple(stride), dtype=dtype, device=value.device)
        value = ordered.copy_(value)
    return value.as_strided((value.numel(),), (1,))
