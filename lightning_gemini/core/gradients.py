"""Gradients: from the parameters' own to reduced shards that wait for the step.

NOTE: reduce order.
Every chunk that an optimizer updates is reduced once per backward on every rank, in one agreed order: a chunk that is
complete waits for those before it, and what has not come when the outermost backward ends travels as zeros. The order
is at first the layout's, a guess, and after the first backward the one in which rank 0 completed its chunks.
On one rank there is nobody to agree with: chunks are reduced as they complete, and what comes late at once.

NOTE: late gradients.
A module shared by several reentrant checkpoints gets its gradient in parts. What comes after its chunk was reduced
waits for the step, where the ranks agree on what to reduce once more; later the chunk waits for as many parts.

NOTE: sound gradients.
The sum of a shard's squares is taken when the shard is made, while it is in the cache. It is what norms are made of,
and it is not finite if an element is not: looking for these takes no pass of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_gemini.core.chunk import Chunk, Home
from lightning_gemini.core.chunk_gradient import ChunkGradient, GradientState, square_sum, square_sum_of
from lightning_gemini.core.collectives import Pending
from lightning_gemini.core.dtypes import DtypePolicy
from lightning_gemini.core.errors import ConfigurationError, OutOfBudgetError
from lightning_gemini.core.landing import Addition, Landings, Part
from lightning_gemini.core.memory import BufferPool, Tier
from lightning_gemini.core.reduction import ReducedNothing, Reduction
from lightning_gemini.core.slabs import Slabs
from lightning_gemini.core.store import Store

#: Reductions under way at a time, as long as all ranks come to them at about the same time. A rank that has no
#: gradient for a chunk comes to its reduction only when its backward is over, and may until then wait for the others in
#: a gather: after this many seconds they go on and leave the reduction for later.
_MAX_IN_FLIGHT, _PATIENCE_SECONDS = 2, 1.0

#: Buffers of this part of the parameters' bytes stay from one backward to the next: page faults cost 2% of a step.
_SPARED_SHARE = 8


class Gradients:
    """All gradients of one engine.

    Args:
        store: the chunks; reductions run through its collectives.
        policy: the dtypes.

    Attributes:
        accumulating: whether more backwards follow before the step, so that shards are best kept in fp32.
        loss_scale: what the loss of the backward under way, or of the next one, is multiplied with; 1 after it.
        consume: called with each gradient when it is reduced, if it is not to wait for the step; then it is dropped.
    """

    def __init__(self, store: Store, policy: DtypePolicy) -> None:
        self._store = store
        self._policy = policy
        self._collectives = store.collectives
        #: what a backward needs beside the shards it leaves; freed when it ends, but for a little where room is plenty
        self._transient = BufferPool(store.device, work=True)
        self._spared = store.layout.nbytes // _SPARED_SHARE if store.device.capacity is None else 0
        self._device_shards = BufferPool(store.device)
        self._landings = Landings(store, self._transient, self._take_in)
        store.beside.append(self)
        self.chunks: dict[int, ChunkGradient] = {
            chunk.index: ChunkGradient(chunk, [store.owned(chunk.index, s.offset, s.end) for s in chunk.spec.slots])
            for chunk in store.chunks
            if chunk.spec.kind.updated
        }
        self._where = {
            place.param: (gradient, slot)
            for gradient in self.chunks.values()
            for slot, place in enumerate(gradient.chunk.spec.slots)
        }
        self._order = [self.chunks[index] for index in store.layout.reduce_order]
        self._next = 0
        self._in_step = True  # the ranks have come to each reduction at about the same time
        self._completed: list[int] | None = [] if self._collectives.world_size > 1 else None  # until it is learnt
        self._in_flight: deque[Reduction] = deque()
        self.accumulating = False
        self.loss_scale = self._late_scale = 1.0
        self.consume: Callable[[ChunkGradient], None] | None = None

    def add(self, param: int, grad: Tensor) -> None:
        """Takes the gradient of parameter number ``param`` in; reduces chunks whose turn has come.

        Raises:
            ConfigurationError: the gradient is sparse.
        """
        place = self._where.get(param)
        if place is None:
            return
        if grad.layout is not torch.strided:
            raise ConfigurationError(
                f"the gradient of {self._store.layout.params[param].name} is sparse ({grad.layout}); chunks hold dense "
                "gradients. Build the module with sparse=False."
            )
        gradient, slot = place
        if gradient.state is GradientState.REDUCING:
            self._settle()
        if gradient.state is GradientState.EMPTY:
            self._open(gradient)
        last = gradient.fill(slot, grad)
        alone = self._collectives.world_size == 1  # there is nobody to agree with on an order, nor on late parts
        if last and gradient.state is GradientState.FILLING and (alone or not gradient.reduced):
            self._complete(gradient)
            self._reduce(gradient) if alone else self._advance()

    @property
    def begun(self) -> bool:
        """Whether any gradient has come in the backward under way."""
        return self._next > 0 or any(g.state is not GradientState.EMPTY or g.reduced for g in self._order)

    def end_backward(self) -> None:
        """The outermost backward is over: reduces what is left, and waits for all of it."""
        self._late_scale = self.loss_scale
        several = self._collectives.world_size > 1
        for gradient in self._order[self._next :]:  # on one rank: of all, those that are incomplete
            if several and gradient.state is GradientState.EMPTY and gradient.wanted:
                self._open(gradient)
            if gradient.state is GradientState.FILLING:
                self._complete(gradient)
            if gradient.state is GradientState.READY:
                self._reduce(gradient)
        self._settle()
        self._next = 0
        for gradient in self._order:
            gradient.end_backward()
        self._landings.collect()
        self._transient.clear(self._spared)
        self.loss_scale = 1.0  # the next loss says its own

    def reduce_nothing(self) -> ReducedNothing:
        """Takes part in the reductions that are left in this backward, for the other ranks; :meth:`reset` follows."""
        left = [g.chunk for g in self._order[self._next :] if g.state is not GradientState.EMPTY or g.wanted]
        sizes = [(chunk.spec.numel, self._policy.reduce_dtype(chunk.full.dtype)) for chunk in left]
        return ReducedNothing(sizes, self._collectives, self._transient, [one.pending for one in self._in_flight])

    def reduce_late(self, gradients: Sequence[ChunkGradient]) -> None:
        """Reduces what came after its chunk's turn, on this rank or another; all ranks call with the same ones."""
        if not gradients:
            return
        self.loss_scale = self._late_scale
        for gradient in gradients:
            if gradient.state is GradientState.EMPTY:
                self._open(gradient)
            gradient.complete()
            self._reduce(gradient)
            gradient.reduced = False  # in the next backward
        self._settle()
        self._landings.wait()
        self.loss_scale = 1.0

    def discard(self, chunks: Sequence[ChunkGradient] | None = None) -> None:
        """Forgets the gradients of ``chunks``, or of all of them, reduced or not."""
        for gradient in self.chunks.values() if chunks is None else chunks:
            if gradient.shard is not None:
                self._shard_pool(gradient.chunk).put(gradient.shard)
                gradient.shard = None
            gradient.forget_scaling()
            gradient.used = [False] * len(gradient.used)
            if gradient.state is GradientState.FILLING:
                self._drop_buffer(gradient)

    def reset(self) -> None:
        """After a failure: drops what the backward under way has not reduced; waits for nobody."""
        for under_way in self._in_flight:
            self._result_pool(under_way.gradient.chunk).drop(under_way.out)
            if under_way.scratch is not None:
                self._transient.drop(under_way.scratch)
        self._in_flight.clear()
        self._landings.wait()
        self._next = 0
        self.loss_scale = 1.0
        for gradient in self.chunks.values():
            if gradient.buffer is not None:
                self._buffer_pool(gradient.chunk).drop(gradient.buffer)
                gradient.buffer = None
                gradient.move(GradientState.EMPTY)
            gradient.end_backward()
        self._transient.clear()

    def release(self) -> None:
        """Drops everything and gives all memory back."""
        self.reset()
        self.discard(list(self.chunks.values()))
        self.reclaim()

    def reclaim(self) -> None:
        """Frees buffers on the device that nobody uses, after waiting for reductions that all ranks have come to."""
        self._landings.wait()
        while self._in_flight and self._finish_if_done():
            pass
        self._device_shards.clear()
        self._transient.clear()

    def beside_bytes(self, chunk: Chunk) -> int:
        """Bytes of the chunk's reduced gradient."""
        gradient = self.chunks.get(chunk.index)
        return 0 if gradient is None or gradient.shard is None else gradient.shard.nbytes

    def move(self, chunk: Chunk, tier: Tier) -> None:
        """Moves the reduced gradient of ``chunk``, which no backward is at work on."""
        gradient = self.chunks.get(chunk.index)
        if gradient is None or gradient.shard is None:
            return
        old, pool = gradient.shard, self._store.slabs if tier is self._store.host else self._device_shards
        gradient.shard = pool.get(old.numel(), old.dtype, _shard_of(chunk)).copy_(old)
        (self._device_shards.drop if tier is self._store.host else self._store.slabs.put)(old)
        gradient.bring_scaling(tier.device)

    def _open(self, gradient: ChunkGradient) -> None:
        dtype = gradient.chunk.full.dtype
        if self._collectives.world_size > 1:
            dtype = self._policy.reduce_dtype(dtype)
        what = f"the gradient of chunk {gradient.chunk.index}"
        gradient.open(self._get(self._buffer_pool(gradient.chunk), gradient.chunk.spec.numel, dtype, what))

    def _complete(self, gradient: ChunkGradient) -> None:
        gradient.complete()
        if self._completed is not None:
            self._completed.append(gradient.chunk.index)

    def learn_order(self) -> None:
        """Takes over the order of rank 0's first backward; called where all ranks are."""
        if self._completed:
            seen = dict.fromkeys(self._collectives.broadcast_object(self._completed))
            rest = [g.chunk.index for g in self._order if g.chunk.index not in seen]
            self._order = [self.chunks[index] for index in (*seen, *rest)]
            self._completed = None

    def _advance(self) -> None:
        while self._next < len(self._order):
            gradient = self._order[self._next]
            if gradient.state is not GradientState.READY:
                if gradient.wanted:
                    return
            else:
                self._reduce(gradient)
            self._next += 1

    def _reduce(self, gradient: ChunkGradient) -> None:
        assert gradient.buffer is not None
        full, what = gradient.buffer, f"the reduced gradient of chunk {gradient.chunk.index}"
        if self._collectives.world_size == 1:
            gradient.move(GradientState.REDUCING)
            gradient.reduced, gradient.buffer = True, None
            gradient.move(GradientState.EMPTY)
            self._keep(gradient, full)
            return
        while len(self._in_flight) >= _MAX_IN_FLIGHT and self._finish_if_done():
            pass
        pool, scratch_numel = self._result_pool(gradient.chunk), self._collectives.scratch_numel(full.numel())
        out = self._get(pool, gradient.chunk.own.numel(), full.dtype, what)
        try:
            scratch = self._get(self._transient, scratch_numel, full.dtype, what) if scratch_numel else None
        except BaseException:
            pool.put(out)
            raise
        gradient.move(GradientState.REDUCING)
        gradient.reduced = True
        if full.dtype == torch.float16:
            full.mul_(1 / self._collectives.world_size)  # here, and not after the sum, which could overflow
        pending = self._collectives.reduce_scatter(full, out, scratch, what)
        self._in_flight.append(Reduction(gradient, pending, out, scratch, self._exchange_marks(gradient)))
        self._store.counters.reduces += 1
        self._store.counters.reduced_bytes += full.nbytes - out.nbytes

    def _settle(self) -> None:
        while self._in_flight:
            self._finish_oldest()

    def _get(self, pool: BufferPool, numel: int, dtype: torch.dtype, what: str) -> Tensor:
        """A buffer, if need be one that a reduction gives back."""
        while True:
            try:
                return pool.get(numel, dtype, what)
            except OutOfBudgetError:
                if self._landings:
                    self._landings.wait()
                elif not self._in_flight or not self._finish_if_done():
                    raise

    def _finish_if_done(self) -> bool:
        """Finishes the oldest reduction, unless another rank has not come to it for some time."""
        done = self._in_flight[0].pending.done(_PATIENCE_SECONDS if self._in_step else 0.0)
        if done:
            self._finish_oldest()
        else:
            self._in_step = False
        return done

    def _finish_oldest(self) -> None:
        under_way = self._in_flight.popleft()
        under_way.pending.wait()
        gradient, out = under_way.gradient, under_way.out
        if under_way.scratch is not None:
            self._transient.put(under_way.scratch)
        if under_way.marks is not None:
            marks, exchanged = under_way.marks
            exchanged.wait()
            gradient.used = marks.bool().tolist()
        self._drop_buffer(gradient)
        if out.dtype != torch.float16:
            out.mul_(1 / self._collectives.world_size)
        self._keep(gradient, out)

    def _exchange_marks(self, gradient: ChunkGradient) -> tuple[Tensor, Pending] | None:
        """Starts to find out which parameters of a chunk have a gradient on any rank, if that cannot wait."""
        if self.consume is None:
            return None
        marks = torch.tensor([float(mark) for mark in gradient.used], device=self._store.device.device)
        return marks, self._collectives.sum_reduced(marks)

    def _drop_buffer(self, gradient: ChunkGradient) -> None:
        assert gradient.buffer is not None
        self._buffer_pool(gradient.chunk).put(gradient.buffer)
        gradient.buffer = None
        gradient.move(GradientState.EMPTY)

    def _keep(self, gradient: ChunkGradient, part: Tensor) -> None:
        """Adds a reduced part to the shard, on the tier where the chunk's shard lives."""
        chunk, keep = gradient.chunk, gradient.chunk.full.dtype
        on_host, adds = chunk.home is Home.HOST, self.accumulating or gradient.shard is not None
        if adds and not (on_host and part.dtype == keep):  # what is narrow crosses so, and is widened there
            keep = torch.promote_types(keep, torch.float32)
        origin = self._result_pool(chunk)
        pool = self._transient if on_host else self._device_shards
        if part.dtype != keep or origin is not pool:
            try:
                moved = self._get(pool, part.numel(), keep, _shard_of(chunk)).copy_(part)
            finally:
                origin.put(part)
            part = moved
        if on_host:
            # on the device, which is quicker; what else is added in host memory counts there
            self._landings.start(Part(gradient, part, self.loss_scale, None if adds else square_sum_of(part)))
            if self.consume is not None:
                self._landings.wait()
        elif (addition := self._take_in(Part(gradient, part, self.loss_scale))) is not None:
            addition.run()
            gradient.square_sum = addition.square_sum
            for tensor in addition.spent:
                pool.put(tensor)

    def _take_in(self, part: Part) -> Addition | None:
        """Makes a part the shard, or says how it is added to it."""
        gradient = part.gradient
        if gradient.shard is not None:
            return self._add(gradient, part)
        gradient.shard = part.values
        gradient.forget_scaling()
        gradient.loss_scale = gradient.tried_scale = part.loss_scale
        gradient.square_sum = part.square_sum
        if self.consume is not None:
            self.consume(gradient)
            self.discard([gradient])
        elif not self.accumulating:
            square_sum(gradient)
        return None

    def _add(self, gradient: ChunkGradient, part: Part) -> Addition:
        before, pool = gradient.shard, self._shard_pool(gradient.chunk)
        assert before is not None
        target, wide = before, torch.promote_types(before.dtype, torch.float32)
        if before.dtype != wide:
            target = pool.get(len(before), wide, _shard_of(gradient.chunk))
        if gradient.clip is not None or gradient.clamped:  # clipped before, and more comes now
            square_sum(gradient)
            if target is not before:
                target.copy_(before)
                pool.put(before)
            gradient.shard = before = target
            gradient.scale()
        gradient.shard, gradient.square_sum = target, None
        gradient.tried_scale = max(gradient.tried_scale, part.loss_scale)
        return Addition(target, before, part.values, gradient.loss_scale / part.loss_scale, not self.accumulating)

    def _shard_pool(self, chunk: Chunk) -> Slabs | BufferPool:
        return self._store.slabs if chunk.home is Home.HOST else self._device_shards

    def _buffer_pool(self, chunk: Chunk) -> BufferPool:
        """Where whole gradients come from: on one rank they are the results of the reduction, too."""
        return self._result_pool(chunk) if self._collectives.world_size == 1 else self._transient

    def _result_pool(self, chunk: Chunk) -> BufferPool:
        """Where reduced gradients come from: the shards' pool, unless they only pass on their way to another one."""
        several = self._collectives.world_size > 1
        dtype = self._policy.reduce_dtype(chunk.full.dtype) if several else chunk.full.dtype
        return self._transient if chunk.home is Home.HOST or dtype != chunk.full.dtype else self._device_shards


def _shard_of(chunk: Chunk) -> str:
    return f"the gradient shard of chunk {chunk.index}"
