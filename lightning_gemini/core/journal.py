"""Writes down one followed step for people: a timeline."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from lightning_gemini.core.chunk import Chunk, Home
from lightning_gemini.core.footprint import trained
from lightning_gemini.core.store import Store
from lightning_gemini.core.timeline import Timeline, TimelineChunk, TimelineMoment

#: A step is like those to come after so many: the first ones still meet fresh memory and updates that made states.
_SETTLING_STEPS = 3


@dataclass(frozen=True)
class _Done:
    """A step that has been written down; see :class:`Timeline`."""

    kind: str
    moments: list[TimelineMoment]
    seconds: float
    update_seconds: float
    update_waited: float
    predicted: float | None


class Journal:
    """A step that was followed from its beginning to its end, one of the first after :meth:`ask`.

    Args:
        store: the chunks.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wanted = 0  # steps to write down, of which the last one stays
        self._writing: str | None = None  # the kind of step
        self._moments: list[TimelineMoment] = []
        self._done: _Done | None = None
        self._predicted: float | None = None
        self._began = self._waited = 0.0
        self._fetched = self._offloaded = 0
        self._updated = self._waited_for_updates = 0.0

    @property
    def writing(self) -> bool:
        """Whether the step under way is being written down."""
        return self._writing is not None

    def ask(self) -> None:
        """One of the next steps that are followed is to be written down."""
        self._wanted = _SETTLING_STEPS

    def begin(self, kind: str, gradients: bool, predicted: float | None) -> None:
        """A followed step begins that should take so many seconds; one without gradients does not replace one with."""
        self.cancel()
        if self._wanted and (gradients or self._done is None or not any(m.backward for m in self._done.moments)):
            self._writing, self._predicted = kind, predicted
            self._began = time.perf_counter()
            self._waited = self._store.waits.seconds()

    def moment(
        self, chunk: Chunk, reason: str, in_use: Collection[int], idle: Collection[int], coming: Collection[int]
    ) -> None:
        """A moment has begun with ``chunk``, which is usable; the others are indices of chunks."""
        self._close()
        device, store = self._store.device, self._store
        waited, self._waited = store.waits.seconds() - self._waited, store.waits.seconds()
        self._moments.append(
            TimelineMoment(
                reason=reason,
                backward=torch._C._current_graph_task_id() != -1,
                chunk=chunk.index,
                seconds=time.perf_counter() - self._began,
                waited=waited,
                resident=tuple(sorted((*in_use, *idle))),
                pinned=tuple(sorted(in_use)),
                coming=tuple(sorted(coming)),
                updating=tuple(sorted(store.host_updates.under_way)),
                homes=device.used - device.work - store.unsharded_bytes,
                unsharded=store.unsharded_bytes,
                other=0,  # known at the moment's end, as are the copies
                fetched=0,
                offloaded=0,
            )
        )
        device.work_peak = device.work

    def end(self, gradients: bool) -> None:
        """The step is over, and went as it was known."""
        self._close()
        updates = self._store.host_updates
        updates.collect()
        self._done = _Done(
            str(self._writing),
            self._moments,
            time.perf_counter() - self._began,
            updates.busy_seconds - self._updated,
            updates.waited_seconds - self._waited_for_updates,
            self._predicted,
        )
        self._wanted -= gradients
        self.cancel()

    def cancel(self) -> None:
        """The step under way is not the one that was expected, or failed."""
        self._writing, self._moments = None, []

    def timeline(self, report: str) -> Timeline:
        """What has been written down; without moments if no step was followed.

        Args:
            report: the memory report.
        """
        done = self._done or _Done("step", [], 0.0, 0.0, 0.0, None)
        store = self._store
        chunks = (
            TimelineChunk(
                index=chunk.index,
                nbytes=chunk.spec.nbytes,
                on_device=chunk.home is not Home.HOST,
                first=chunk.names[0],
                trained=trained(chunk.spec),
                kept=chunk.home is Home.FULL,
            )
            for chunk in store.chunks
        )
        ranks = store.layout.world_size
        return Timeline(
            kind=done.kind,
            rank=store.collectives.rank,
            world_size=ranks,
            capacity=store.device.capacity,
            chunks=tuple(chunks),
            moments=tuple(done.moments),
            seconds=done.seconds,
            report=report,
            update_seconds=done.update_seconds,
            update_waited=done.update_waited,
            predicted=done.predicted,
        )

    def _close(self) -> None:
        counters = self._store.counters
        if not self._moments:
            return  # what the first one needs may have been fetched before it
        self._moments[-1] = replace(
            self._moments[-1],
            other=self._store.device.work_peak,
            fetched=counters.fetched_bytes - self._fetched,
            offloaded=counters.offloaded_bytes - self._offloaded,
        )
        self._note_copies()

    def mark(self) -> None:
        """A step is over: what is copied and updated from now on belongs to the next one."""
        self._note_copies()
        updates = self._store.host_updates
        self._updated, self._waited_for_updates = updates.busy_seconds, updates.waited_seconds

    def _note_copies(self) -> None:
        counters = self._store.counters
        self._fetched, self._offloaded = counters.fetched_bytes, counters.offloaded_bytes
