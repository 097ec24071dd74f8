"""A thread that does one thing after the other, beside the one that trains."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread

_Job = tuple[Callable[[], None], "Future[None]"]


class Worker:
    """Does what is submitted, in that order; its thread starts with the first job and does not keep the process alive.

    Args:
        name: of the thread.
        prepare: called first of all in the thread; if it fails, so does each job, and it is called again for the next.
    """

    def __init__(self, name: str, prepare: Callable[[], None] = lambda: None) -> None:
        self._name = name
        self._prepare = prepare
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread: Thread | None = None
        weakref.finalize(self, self._jobs.put, None).atexit = False  # whoever forgets close() leaves no thread behind

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Has ``job`` done after those before it; the future carries its exception."""
        future: Future[None] = Future()
        self._jobs.put((job, future))
        if self._thread is None:
            self._thread = Thread(target=_work_off, args=(self._prepare, self._jobs), name=self._name, daemon=True)
            self._thread.start()
        return future

    def close(self, wait: bool = False) -> None:
        """Ends the thread when it has done what was submitted; ``wait`` until then."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            if wait:
                thread.join()


def _work_off(prepare: Callable[[], None], jobs: SimpleQueue[_Job | None]) -> None:
    todo: Callable[[], None] | None = prepare
    while (entry := jobs.get()) is not None:
        job, future = entry
        try:
            if todo is not None:  # here, where somebody learns of its exception
                todo()
                todo = None
            job()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)
        del entry, job, future  # they hold buffers


def hidden_share(busy: float, waited: float) -> float | None:
    """How much of ``busy`` seconds of a worker nobody has waited for, from 0 to 1; ``None`` if it had nothing to do."""
    return max(0.0, 1 - waited / busy) if busy else None
