"""Reduced gradients on their way from the device into the shards in host memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gemini.core.chunk_gradient import ChunkGradient, square_sum_of
from lightning_gemini.core.errors import OutOfBudgetError
from lightning_gemini.core.memory import BufferPool
from lightning_gemini.core.store import Store
from lightning_gemini.core.streams import Mark

#: Parts in host memory that may wait to be added: each takes memory beside the shard.
_ADDITIONS = 2

#: Elements that are added at a time, so that their wider copies stay in the processor's cache.
_BLOCK = 2**18


@dataclass(frozen=True, eq=False)
class Part:
    """One reduced part of a gradient.

    Attributes:
        values: this rank's slice of the mean, flat.
        loss_scale: what it has to be divided by.
        square_sum: of the values, a scalar on any device, if it is known.
    """

    gradient: ChunkGradient
    values: Tensor
    loss_scale: float
    square_sum: Tensor | None = None


class Addition:
    """A part that is being added to a shard.

    Args:
        target: the shard that is to be.
        shard: what it is to hold first; ``target`` itself if that holds it already.
        part: is multiplied with ``factor`` and added; at most as wide as ``target``.
        counts: whether the sum of squares is taken, too.
    """

    def __init__(self, target: Tensor, shard: Tensor, part: Tensor, factor: float, counts: bool) -> None:
        self._target, self._shard, self._part, self._factor = target, shard, part, factor
        self._counts = counts
        self.square_sum: Tensor | None = None

    @property
    def spent(self) -> Sequence[Tensor]:
        """What nobody needs afterwards."""
        return [self._part] if self._shard is self._target else [self._part, self._shard]

    @torch.no_grad()
    def run(self) -> None:
        """Adds; by any thread."""
        # on a GPU each block would be a kernel of its own
        size = _BLOCK if self._target.device.type == "cpu" else len(self._target)
        blocks = (tensor.split(size) for tensor in (self._target, self._shard, self._part))
        for target, shard, part in zip(*blocks, strict=True):
            if self._shard is not self._target:
                target.copy_(shard)
            wide = part.to(target.dtype)
            target.add_(wide if self._factor == 1 else wide * self._factor)
        if self._counts:
            self.square_sum = square_sum_of(self._target)


@dataclass(frozen=True, eq=False)
class _Landing:
    """One part under way; ``sent`` is where it comes from, not to be written until ``mark`` is over."""

    part: Part
    sent: Tensor
    mark: Mark


class Landings:
    """Copies and additions under way, each in the order in which they were started.

    Args:
        store: the chunks.
        origin: where the parts on the device come from, and go back to.
        take_in: called with each part when it has arrived in host memory; returns what is left to be added, if there
            was something before.
    """

    def __init__(self, store: Store, origin: BufferPool, take_in: Callable[[Part], Addition | None]) -> None:
        self._store = store
        self._origin = origin
        self._take_in = take_in
        self._copies: deque[_Landing] = deque()
        self._additions: deque[tuple[ChunkGradient, Addition, Future[None]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._copies or self._additions)

    def start(self, part: Part) -> None:
        """Starts to copy ``part``, which is on the device; takes in what has arrived meanwhile.

        Raises:
            OutOfBudgetError: there is no host memory for it.
        """
        if part.gradient.landing is not None:
            self.wait()
        sent = part.values
        try:
            arriving = self._room_for(part)
        except BaseException:
            self._origin.put(sent)
            raise
        lane = self._store.offloading
        with lane.after_compute():
            arriving.copy_(sent, non_blocking=True)
        landed = Part(part.gradient, arriving, part.loss_scale, part.square_sum)
        self._copies.append(_Landing(landed, sent, lane.mark()))
        part.gradient.landing = self.wait
        self._store.counters.offloaded_bytes += sent.nbytes
        self.collect()

    def collect(self) -> None:
        """Takes in what has arrived; waits for nothing."""
        while self._copies and self._copies[0].mark.over():
            self._land()
        while self._additions and self._additions[0][2].done():
            self._finish()

    def wait(self) -> None:
        """Waits for all that is under way, and takes it in."""
        while self._copies:
            self._land()
        while self._additions:
            self._finish()

    def _room_for(self, part: Part) -> Tensor:
        what = f"the gradient shard of chunk {part.gradient.chunk.index}"
        try:
            return self._store.slabs.get(part.values.numel(), part.values.dtype, what)
        except OutOfBudgetError:
            if not self:
                raise
            self.wait()  # what has been added leaves room
            return self._store.slabs.get(part.values.numel(), part.values.dtype, what)

    def _land(self) -> None:
        landing = self._copies.popleft()
        landing.mark.wait()
        gradient = landing.part.gradient
        gradient.landing = None
        self._origin.put(landing.sent)
        try:
            addition = self._take_in(landing.part)
        except BaseException:
            if gradient.shard is not landing.part.values:
                self._store.slabs.put(landing.part.values)
            raise
        if addition is not None:
            self._additions.append((gradient, addition, self._store.host_updates.submit(addition.run)))
            gradient.landing = self.wait
            while len(self._additions) > _ADDITIONS:
                self._finish()

    def _finish(self) -> None:
        gradient, addition, future = self._additions.popleft()
        gradient.landing = None
        future.result()
        gradient.square_sum = addition.square_sum
        for tensor in addition.spent:
            self._store.slabs.put(tensor)
