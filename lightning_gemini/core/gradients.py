"""Gradients: from the parameters' own to reduced shards that wait for the step.

NOTE: reduce order.
Every chunk that an optimizer updates is reduced once per backward on every rank, in one agreed order: a chunk that is
complete waits for those before it, and what has not come when the outermost backward ends travels as zeros. So
reductions match across the ranks even where a parameter is used on one of them only.

The order is at first the layout's, a guess, and after the first backward the one in which rank 0 completed its chunks.

NOTE: late gradients.
A module shared by several reentrant checkpoints gets its gradient in parts. What comes after its chunk was reduced is
kept until the step, where the ranks agree on the chunks to reduce once more; from then on the chunk waits for as many
parts as it got.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from lightning_gemini.core.chunk import Chunk, Home
from lightning_gemini.core.chunk_gradient import ChunkGradient, GradientState
from lightning_gemini.core.collectives import Pending
from lightning_gemini.core.dtypes import DtypePolicy
from lightning_gemini.core.errors import ConfigurationError, OutOfBudgetError
from lightning_gemini.core.memory import BufferPool
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
    """

    def __init__(self, store: Store, policy: DtypePolicy) -> None:
        self._store = store
        self._policy = policy
        self._collectives = store.collectives
        #: what a backward needs beside the shards it leaves; freed when it ends, but for a little where room is plenty
        self._transient = BufferPool(store.device)
        self._spared = store.layout.nbytes // _SPARED_SHARE if store.device.capacity is None else 0
        self._shards = {False: BufferPool(store.device), True: BufferPool(store.host)}  # by whether on the host
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
        self._completed: list[int] | None = []  # indices, until the order is learnt
        self._in_flight: deque[tuple[ChunkGradient, Pending, Tensor, Tensor | None]] = deque()
        self.accumulating = False

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
        if last and gradient.state is GradientState.FILLING and not gradient.reduced:
            self._complete(gradient)
            self._advance()

    @property
    def begun(self) -> bool:
        """Whether any gradient has come in the backward under way."""
        return self._next > 0 or any(g.state is not GradientState.EMPTY or g.reduced for g in self._order)

    def end_backward(self) -> None:
        """The outermost backward is over: reduces what is left, and waits for all of it."""
        several = self._collectives.world_size > 1
        for gradient in self._order[self._next :]:
            if gradient.state is GradientState.EMPTY and several and _wants_gradient(gradient.chunk):
                self._open(gradient)
            if gradient.state is GradientState.FILLING:
                self._complete(gradient)
            if gradient.state is GradientState.READY:
                self._reduce(gradient)
        self._settle()
        self._next = 0
        for gradient in self._order:
            if gradient.state is GradientState.FILLING and not several:  # late, and nobody to agree with
                gradient.complete()
                self._reduce(gradient)
                self._settle()
            gradient.end_backward()
        self._transient.clear(self._spared)

    def agree(self, chunks: list[ChunkGradient], flags: list[bool]) -> list[bool]:
        """Makes ``used`` of ``chunks`` the same on all ranks and reduces late gradients; before every step.

        Args:
            flags: more things to agree on.

        Returns:
            for each flag whether any rank has set it.
        """
        if self._collectives.world_size == 1:
            return flags
        late = [gradient.state is GradientState.FILLING for gradient in chunks]
        marks = [float(mark) for group in (flags, late, *(g.used for g in chunks)) for mark in group]
        votes = self._collectives.sum(torch.tensor(marks, device=self._store.device.device)).bool().tolist()
        for gradient, somewhere in zip(chunks, votes[len(flags) :], strict=False):
            if somewhere:
                if gradient.state is GradientState.EMPTY:
                    self._open(gradient)
                gradient.complete()
                self._reduce(gradient)
                gradient.reduced = False  # in the next backward
        self._settle()
        start = len(flags) + len(chunks)
        for gradient in chunks:
            gradient.used = votes[start : start + len(gradient.used)]
            start += len(gradient.used)
        self._learn_order()
        return votes[: len(flags)]

    def discard(self, chunks: list[ChunkGradient]) -> None:
        """Forgets the gradients of ``chunks``, reduced or not."""
        for gradient in chunks:
            if gradient.shard is not None:
                self._shard_pool(gradient.chunk).put(gradient.shard)
                gradient.shard = None
            gradient.used = [False] * len(gradient.used)
            if gradient.state is GradientState.FILLING:
                self._drop_buffer(gradient)

    def reset(self) -> None:
        """After a failure: drops what the backward under way has not reduced; waits for nothing and nobody."""
        for _, _, out, scratch in self._in_flight:
            self._store.device.give(out.nbytes + (scratch.nbytes if scratch is not None else 0))
        self._in_flight.clear()
        self._next = 0
        for gradient in self.chunks.values():
            if gradient.buffer is not None:
                self._store.device.give(gradient.buffer.nbytes)
                gradient.buffer = None
                gradient.move(GradientState.EMPTY)
            gradient.end_backward()
        self._transient.clear()

    def release(self) -> None:
        """Drops everything and gives all memory back."""
        self.reset()
        self.discard(list(self.chunks.values()))
        for pool in self._shards.values():
            pool.clear()

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

    def _learn_order(self) -> None:
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
                if _wants_gradient(gradient.chunk):
                    return
            else:
                self._reduce(gradient)
            self._next += 1

    def _reduce(self, gradient: ChunkGradient) -> None:
        gradient.move(GradientState.REDUCING)
        gradient.reduced = True
        assert gradient.buffer is not None
        full, what = gradient.buffer, f"the reduced gradient of chunk {gradient.chunk.index}"
        if self._collectives.world_size == 1:
            gradient.buffer = None
            gradient.move(GradientState.EMPTY)
            self._keep(gradient, full)
            return
        while len(self._in_flight) >= _MAX_IN_FLIGHT and self._finish_if_done():
            pass
        out = self._get(self._result_pool(gradient.chunk), gradient.chunk.own.numel(), full.dtype, what)
        scratch_numel = self._collectives.scratch_numel(full.numel())
        scratch = self._get(self._transient, scratch_numel, full.dtype, what) if scratch_numel else None
        pending = self._collectives.reduce_scatter(full, out, scratch)
        self._in_flight.append((gradient, pending, out, scratch))
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
                if not self._in_flight or not self._finish_if_done():
                    raise

    def _finish_if_done(self) -> bool:
        """Finishes the oldest reduction, unless another rank has not come to it for some time."""
        done = self._in_flight[0][1].done(_PATIENCE_SECONDS if self._in_step else 0.0)
        if done:
            self._finish_oldest()
        else:
            self._in_step = False
        return done

    def _finish_oldest(self) -> None:
        gradient, pending, out, scratch = self._in_flight.popleft()
        pending.wait()
        if scratch is not None:
            self._transient.put(scratch)
        self._drop_buffer(gradient)
        self._keep(gradient, out.mul_(1 / self._collectives.world_size))

    def _drop_buffer(self, gradient: ChunkGradient) -> None:
        assert gradient.buffer is not None
        self._buffer_pool(gradient.chunk).put(gradient.buffer)
        gradient.buffer = None
        gradient.move(GradientState.EMPTY)

    def _keep(self, gradient: ChunkGradient, part: Tensor) -> None:
        """Adds a reduced part to the shard, on the tier where the chunk's shard lives."""
        chunk, keep = gradient.chunk, gradient.chunk.full.dtype
        if self.accumulating or gradient.shard is not None:
            keep = torch.promote_types(keep, torch.float32)
        origin, pool = self._result_pool(chunk), self._shard_pool(chunk)
        what = f"the gradient shard of chunk {chunk.index}"
        if chunk.home is Home.HOST:
            self._store.counters.offloaded_bytes += part.nbytes
        if part.dtype != keep or origin is not pool:
            moved = pool.get(part.numel(), keep, what).copy_(part)
            origin.put(part)
            part = moved
        if gradient.shard is None:
            gradient.shard = part
            return
        if gradient.shard.dtype != keep:
            wide = pool.get(part.numel(), keep, what).copy_(gradient.shard)
            pool.put(gradient.shard)
            gradient.shard = wide
        gradient.shard.add_(part)
        pool.put(part)

    def _shard_pool(self, chunk: Chunk) -> BufferPool:
        return self._shards[chunk.home is Home.HOST]

    def _buffer_pool(self, chunk: Chunk) -> BufferPool:
        """Where whole gradients come from: on one rank they are the results of the reduction, too."""
        return self._result_pool(chunk) if self._collectives.world_size == 1 else self._transient

    def _result_pool(self, chunk: Chunk) -> BufferPool:
        """Where reduced gradients come from: the shards' pool, unless they only pass on their way to another one."""
        several = self._collectives.world_size > 1
        dtype = self._policy.reduce_dtype(chunk.full.dtype) if several else chunk.full.dtype
        return self._transient if chunk.home is Home.HOST or dtype != chunk.full.dtype else self._shards[False]


def _wants_gradient(chunk: Chunk) -> bool:
    return any(param.requires_grad for param in chunk.params)
