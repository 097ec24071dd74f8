"""Updates of chunks whose home is host memory, made beside the thread that trains.

NOTE: nothing stale, nothing torn.
A chunk is updated in the background with the settings and the gradient of the call of ``step()`` that asked for it.
From then on its shard, its master and its states belong to the worker: whoever asks the chunk for its shard waits until
that is over (:attr:`Chunk.shard`), so the next forward waits for its own chunks alone, and any other reader likewise.
The arithmetic is that of an update at once, on the same operands, so the bits are the same.

The overlap follows DeepSpeed's ZeRO-Offload and SuperOffload, but for their delayed or speculative updates: here the
factor of clipping is known before the first chunk is updated.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock

import torch
from torch import Tensor

from lightning_gemini.core.chunk import Chunk, Home
from lightning_gemini.core.cores import HostThreads
from lightning_gemini.core.errors import UpdateError
from lightning_gemini.core.streams import Mark
from lightning_gemini.core.worker import Worker
from lightning_gemini.optim.kernel import kernel_for


class _HostUpdate:
    """One update under way.

    Attributes:
        future: of :meth:`run`, once the worker has it.
        began, ended: when the chunk itself was updated, in seconds of ``time.perf_counter``.
    """

    future: Future[None]

    def __init__(
        self,
        chunk: Chunk,
        job: Callable[[], None],
        gradient: Tensor,
        after: Mark,
        finish: Callable[[_HostUpdate], None],
    ) -> None:
        self.chunk = chunk
        self.gradient = gradient
        self._after = after
        self._finish = finish
        self._jobs = deque([job])
        self._lock = Lock()
        self._over = False
        self.began = self.ended = 0.0

    def run(self) -> None:
        """In the worker."""
        try:
            with torch.no_grad():
                self._after.wait()
                self.began = self.ended = time.perf_counter()
                self._jobs.popleft()()
                self.ended = time.perf_counter()
                while (job := self._next()) is not None:
                    job()
        finally:
            with self._lock:
                self._over = True

    def then(self, job: Callable[[], None]) -> bool:
        with self._lock:
            if not self._over:
                self._jobs.append(job)
            return not self._over

    def wait(self) -> None:
        self._finish(self)

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            self._over = not self._jobs
            return None if self._over else self._jobs.popleft()


class HostUpdates:
    """The updates under way, in the order in which they were started.

    Args:
        threads: of an update; ``None`` if nothing is to be updated in the background.
        give_back: takes the gradient of a chunk that has been updated.

    Attributes:
        busy_seconds: how long the worker has been updating.
        waited_seconds: how long others have waited for it.
        count: chunks updated in the background.
    """

    def __init__(self, threads: HostThreads | None, give_back: Callable[[Tensor], None]) -> None:
        self.threads = threads
        self._give_back = give_back
        self._worker: Worker | None = None
        self._under_way: deque[_HostUpdate] = deque()
        self._torn: list[Chunk] = []  # whose update has failed
        self._failure: UpdateError | None = None
        self.busy_seconds = self.waited_seconds = 0.0
        self.count = 0

    @property
    def failed(self) -> bool:
        """Whether an update has failed, so that some of the weights are those of another step."""
        return self._failure is not None

    @property
    def possible(self) -> bool:
        """Whether updates by rules are made in the background at all."""
        # torch.compile has no promise for two threads at a time
        return self.threads is not None and kernel_for(torch.device("cpu")).name != "compiled"

    def takes(self, chunk: Chunk) -> bool:
        """Whether an update of ``chunk`` by a rule is made in the background."""
        return chunk.home is Home.HOST and self.possible

    def start(self, chunk: Chunk, job: Callable[[], None], gradient: Tensor, after: Mark) -> None:
        """Has ``job`` update ``chunk``, not before ``after``; ``gradient`` is given back when that is over."""
        worker = self._begun()
        self.count += 1
        update = _HostUpdate(chunk, job, gradient, after, self._finish)
        update.future = worker.submit(update.run)
        self._under_way.append(update)
        chunk.deferred = update

    @property
    def under_way(self) -> tuple[int, ...]:
        """The indices of the chunks whose update is not over, in the order of their turns."""
        # a copy at once: a watchdog asks from another thread
        return tuple(update.chunk.index for update in tuple(self._under_way) if not update.future.done())

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Has the worker do something else between updates; it is done at once where there is no background."""
        if self.threads is not None:
            return self._begun().submit(job)
        job()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _begun(self) -> Worker:
        if self._worker is None:
            assert self.threads is not None
            self._worker = self.threads.worker("gemini-update")
        return self._worker

    def keep(self, most: int) -> None:
        """Waits until no more than ``most`` are under way: each has a gradient that takes memory.

        Raises:
            UpdateError: an update has failed, now or before.
        """
        self.collect()
        while len(self._under_way) > most:
            self._collect(self._under_way[0])
        self.check()

    def collect(self) -> None:
        """Takes notice of what is over, without waiting."""
        while self._under_way and self._under_way[0].future.done():
            self._collect(self._under_way[0])

    def check(self) -> None:
        """Takes notice of what is over, without waiting.

        Raises:
            UpdateError: an update has failed, now or before.
        """
        self.collect()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Waits for all, failed or not, and ends the thread; shards can be read from then on, torn or not."""
        while self._under_way:
            self._collect(self._under_way[0])
        for chunk in self._torn:
            chunk.deferred = None
        if self._worker is not None:
            self._worker.close(wait=True)

    def _finish(self, update: _HostUpdate) -> None:
        if update in self._under_way:  # else it has failed before
            self._collect(update)
        self.check()

    def _collect(self, update: _HostUpdate) -> None:
        """Waits for one and takes it off the chunk."""
        if not update.future.done():
            began = time.perf_counter()
            try:
                update.future.exception()
            finally:
                self.waited_seconds += time.perf_counter() - began
        error = update.future.exception()
        if error is None:
            update.chunk.deferred = None
        else:
            self._torn.append(update.chunk)
        self._under_way.remove(update)
        self._give_back(update.gradient)
        self.busy_seconds += update.ended - update.began
        if error is not None and self._failure is None:
            self._failure = UpdateError(
                f"the update of chunk {update.chunk.index}, with {update.chunk.names[0]} in it, failed in the "
                f"background: {type(error).__name__}: {error}. Other chunks have been updated, so the weights are not "
                "those of any step. Go on from the last checkpoint."
            )
            self._failure.__cause__ = error
