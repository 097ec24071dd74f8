"""Reduced gradients on their way from the device to host memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_gemini.core.chunk_gradient import ChunkGradient
from lightning_gemini.core.memory import BufferPool
from lightning_gemini.core.store import Store
from lightning_gemini.core.streams import Mark


@dataclass(frozen=True, eq=False)
class _Landing:
    """One part under way; ``sent`` is where it comes from, not to be written until ``mark`` is over."""

    gradient: ChunkGradient
    part: Tensor
    sent: Tensor
    square_sum: Tensor | None
    mark: Mark


class Landings:
    """Copies under way, in the order in which they were started.

    Args:
        store: the chunks.
        origin: where the parts on the device come from, and go back to.
        take_in: called with each gradient and its part in host memory when that has arrived, and with the sum of the
            part's squares if it is known.
    """

    def __init__(
        self, store: Store, origin: BufferPool, take_in: Callable[[ChunkGradient, Tensor, Tensor | None], None]
    ) -> None:
        self._store = store
        self._origin = origin
        self._take_in = take_in
        self._under_way: deque[_Landing] = deque()

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def start(self, gradient: ChunkGradient, part: Tensor, square_sum: Tensor | None) -> None:
        """Starts to copy ``part``, which is on the device; takes in what has arrived meanwhile."""
        if gradient.landing is not None:
            self.wait()
        what = f"the gradient shard of chunk {gradient.chunk.index}"
        try:
            landing = self._store.slabs.get(part.numel(), part.dtype, what)
        except BaseException:
            self._origin.put(part)
            raise
        lane = self._store.offloading
        with lane.after_compute():
            landing.copy_(part, non_blocking=True)
        self._under_way.append(_Landing(gradient, landing, part, square_sum, lane.mark()))
        gradient.landing = self.wait
        self._store.counters.offloaded_bytes += part.nbytes
        self.collect()

    def collect(self) -> None:
        """Takes in what has arrived; waits for nothing."""
        while self._under_way and self._under_way[0].mark.over():
            self._land()

    def wait(self) -> None:
        """Waits for all that is under way, and takes it in."""
        while self._under_way:
            self._land()

    def _land(self) -> None:
        landing = self._under_way.popleft()
        landing.mark.wait()
        landing.gradient.landing = None
        self._origin.put(landing.sent)
        self._take_in(landing.gradient, landing.part, landing.square_sum)
