"""Notices that this rank makes no progress, before the process group's timeout ends it."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from threading import Event, Thread, current_thread

from lightning_gemini.core.hang import Hang
from lightning_gemini.core.pulse import Pulse

_LOG = logging.getLogger(__name__)

#: The share of the timeout after which a rank counts as stuck. The others have the rest of it to say where they are,
#: and where a timeout ends the process (NCCL) the file has to be there before.
_STUCK_SHARE = 0.9

_JOIN_SECONDS = 2.0


class Watchdog:
    """Looks at a pulse now and then, in a thread of its own: it holds no lock of the engine and joins no collective.

    A rank is stuck if its pulse stands still inside a step or in a wait for other ranks. Between steps it may take as
    long as it likes, until another rank is stuck and calls: then it says where it is. The thread ends with the
    watchdog, at the end of the process or on :meth:`close`.

    Args:
        pulse: what the rank is doing.
        hang: what is done about it.
        clock: seconds that do not go back.
    """

    def __init__(self, pulse: Pulse, hang: Hang, clock: Callable[[], float] = time.monotonic) -> None:
        self._pulse = pulse
        self._hang = hang
        self._clock = clock
        self.period = hang.period
        self._seen = pulse.beats
        self._looked = clock()
        self._still = 0.0  # seconds without progress
        self._told = False  # the others, that this rank is stuck
        self._close: Callable[[], object] = lambda: None

    def start(self) -> None:
        """Begins to look."""
        stop = Event()
        # the thread must not keep the watchdog alive, which would keep the chunks
        thread = Thread(target=_watch, args=(weakref.ref(self), stop, self.period), name="gemini-watchdog", daemon=True)
        thread.start()
        self._close = weakref.finalize(self, _end, stop, thread)

    def close(self) -> None:
        """Ends the thread."""
        self._close()

    def look(self) -> None:
        """One look."""
        now = self._clock()
        # a process that was suspended, as in a debugger, made no progress and could not have
        passed, self._looked = min(now - self._looked, 4 * self.period), now
        beats = self._pulse.beats
        if beats != self._seen:
            if self._told:
                self._hang.called()  # what was called during this hang is answered
                _LOG.warning("rank %d goes on after %.1f s without progress", self._hang.rank, self._still)
            self._seen, self._still, self._told = beats, 0.0, False
            return
        self._still = self._still + passed if self._pulse.busy else 0.0
        if self._told:
            return
        if self._still >= _STUCK_SHARE * self._hang.timeout:
            self._told = True
            _LOG.warning("%s", self._hang.alarm(self._still))
        elif (caller := self._hang.called()) is not None:
            self._hang.answer(caller)


def _watch(watchdog: weakref.ref[Watchdog], stop: Event, period: float) -> None:
    while not stop.wait(period):
        dog = watchdog()
        if dog is None:
            return
        try:
            dog.look()
        except Exception:  # nothing that goes wrong here is a reason for a run to fail
            _LOG.debug("the watchdog could not look", exc_info=True)
        del dog


def _end(stop: Event, thread: Thread) -> None:
    stop.set()
    if thread is not current_thread():
        thread.join(_JOIN_SECONDS)
