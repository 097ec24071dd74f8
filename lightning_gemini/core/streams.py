"""Lanes: copies between device and host that run beside the compute stream, one stream for each direction.

The rules that keep device memory safe without ``record_stream`` are those of FSDP2 (``torch.distributed.fsdp``): memory
is allocated and freed on the compute stream; a copy stream waits for what the compute stream has been given before it
touches memory that was allocated there; the compute stream waits for a copy before it uses or frees what was copied.
The compute stream is whatever stream is current where a method is called.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

#: What no clock can tell from nothing, in seconds.
_SHORTEST = 1e-7

#: Seconds after which repetitions have shown what they can, and how many there are at the least and at the most.
_LONG_ENOUGH, _FEWEST, _MOST = 4e-3, 2, 64

#: A point in time: seconds on the host, or an event on the device.
_Instant = float | torch.cuda.Event


class Mark(Protocol):
    """A point in a lane's work."""

    def join(self) -> None:
        """The compute stream waits for it before it goes on; the host does not wait."""

    def wait(self) -> None:
        """The host waits for it."""

    def over(self) -> bool:
        """Whether all work before it is done; does not wait."""


class _Passed:
    """The mark of work that was done when it was issued."""

    def join(self) -> None:
        return

    def wait(self) -> None:
        return

    def over(self) -> bool:
        return True


_PASSED, _NOTHING = _Passed(), nullcontext()


class _EventMark:
    """The mark of work on a CUDA stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._device, self._event = stream.device, torch.cuda.Event()
        self._event.record(stream)

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def wait(self) -> None:
        self._event.synchronize()

    def over(self) -> bool:
        return bool(self._event.query())


class Lane:
    """One copy stream of ``device``. Off CUDA there are none: work runs at once and marks are over when made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after_compute(self) -> AbstractContextManager[Any]:
        """Work issued inside runs on this lane, after what the compute stream has been given so far.

        Nothing may be allocated inside: the memory would belong to the lane, not to the compute stream. Copies want
        ``non_blocking=True`` and pinned memory; others keep the host until they are over.
        """
        self.follow()
        return self.work()

    def follow(self) -> None:
        """What is issued on this lane from now on runs after what the compute stream has been given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def work(self) -> AbstractContextManager[Any]:
        """Work issued inside runs on this lane, by any thread, after :meth:`follow`; see :meth:`after_compute`."""
        return _NOTHING if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> Mark:
        """The mark of what has been issued on this lane so far.

        The compute stream joins it before it uses, changes or frees what was copied; the host waits for it before it
        does so. What another lane is to do after it joins it inside that lane's ``after_compute``.
        """
        return _PASSED if self._stream is None else _EventMark(self._stream)


def lanes(device: torch.device) -> tuple[Lane, Lane]:
    """The lanes for fetches (host to device) and for offloads (device to host), which may run at the same time."""
    return Lane(device), Lane(device)


class Stopwatch:
    """Adds up how long the compute stream of ``device`` waited, without making the host wait for it.

    On CUDA a measurement is a pair of timing events on the compute stream, which are read when they have passed. Off
    CUDA it is what the host takes: there the work itself is what blocks, so it belongs inside the measurement.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Counts what is inside, such as ``mark.join()``; not if it raises."""
        if self._device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        self._resolve()  # so that events do not pile up where nobody asks
        before = _timing_event(self._device)
        yield
        self._pending.append((before, _timing_event(self._device)))

    def seconds(self) -> float:
        """The sum of all measurements that are over, in seconds; it never falls.

        On CUDA those that the device has not come to yet are missing: ask where the host has waited for the device
        anyway, as after reading a loss. An empty measurement counts a few microseconds.
        """
        self._resolve()
        return self._seconds

    def _resolve(self) -> None:
        while self._pending:
            try:
                before, after = self._pending.popleft()
            except IndexError:  # a watchdog asks from another thread
                return
            if not after.query():
                self._pending.appendleft((before, after))
                return
            self._seconds += before.elapsed_time(after) / 1000


class Laps:
    """How long the compute stream of ``device`` works between :meth:`begin` and :meth:`end`, again and again.

    On CUDA from one timing event on the compute stream to another, so what the host does meanwhile does not count
    unless the device has to wait for it. Off CUDA it is what the host takes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: list[tuple[_Instant, _Instant]] = []
        self._began: _Instant | None = None

    def begin(self) -> None:
        """A lap begins; one that is under way ends."""
        self.end()
        self._began = _instant(self._device)

    def end(self) -> None:
        """The lap under way ends, if there is one."""
        if self._began is not None:
            self._laps.append((self._began, _instant(self._device)))
            self._began = None

    def seconds(self) -> list[float]:
        """Of each lap that has ended; waits for the device to have come so far."""
        return [_seconds_between(*lap) for lap in self._laps]


def best_seconds(device: torch.device, work: Callable[[], object], times: int | None = None) -> float:
    """The least that ``work`` takes when it is repeated on the current stream of ``device``; the host waits.

    Args:
        times: repetitions; ``None`` for as many as take some milliseconds, after a first one that does not count.
    """

    def repeated(times: int, patience: float) -> float:
        laps, start = Laps(device), time.perf_counter()
        for done in range(times):
            if done >= _FEWEST and time.perf_counter() - start > patience:
                break
            laps.begin()
            work()
            laps.end()
        return max(min(laps.seconds()), _SHORTEST)

    if times is not None:
        return repeated(times, math.inf)
    work()
    if device.type != "cuda":
        return repeated(_MOST, _LONG_ENOUGH)
    once = repeated(1, math.inf)  # the host's clock does not tell
    return min(once, repeated(min(max(int(_LONG_ENOUGH / once), _FEWEST), _MOST), math.inf))


def _instant(device: torch.device) -> _Instant:
    if device.type != "cuda":
        return time.perf_counter()
    return _timing_event(device)


def _timing_event(device: torch.device) -> torch.cuda.Event:
    """On the compute stream of ``device``, now."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds_between(before: _Instant, after: _Instant) -> float:
    if isinstance(before, float) or isinstance(after, float):
        assert isinstance(before, float)
        assert isinstance(after, float)
        return after - before
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000
