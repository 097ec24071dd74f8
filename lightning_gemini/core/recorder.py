"""Writes down what a live step does, as a trace."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from lightning_gemini.core.chunk import Chunk
from lightning_gemini.core.memory import MemoryProbe, Tier
from lightning_gemini.core.streams import Laps
from lightning_gemini.core.trace import Moment, Trace


class Recorder:
    """The moments of one step, and what is on the device in each beside chunks.

    Args:
        kind: of the step.
        device: the tier whose memory is looked at.
        probe: says what the device's allocator has given out, where there is one.
        before: the moments that the step began with, if it is not recorded from its beginning.
    """

    def __init__(self, kind: str, device: Tier, probe: MemoryProbe, before: Sequence[Moment] = ()) -> None:
        self._kind = kind
        self._device = device
        self._probe = probe
        self._moments = list(before)
        self._begun = {moment.chunk for moment in before}
        self._opened: Moment | None = None  # without its memory, which its end tells
        self._foreign = 0  # bytes of chunks that are in use all through the step
        self._counted = 0  # bytes of chunks, when the moment began
        self._laps = Laps(device.device)  # one for each moment
        self._before = len(before)

    def begin(self, chunk: Chunk, reason: str, in_use: Collection[Chunk]) -> None:
        """A moment begins: ``chunk`` is usable now, and ``in_use`` are all chunks that are, it among them.

        Chunk bytes do not change before the next one.
        """
        self._close()
        self._begun.add(chunk.index)
        pinned = tuple(sorted(c.index for c in in_use if c.index in self._begun))
        self._foreign = sum(c.spec.nbytes for c in in_use if c.index not in self._begun)
        self._opened = Moment(chunk.index, reason, torch._C._current_graph_task_id() != -1, pinned)
        self._device.work_peak = self._device.work
        self._counted = self._device.used - self._device.work
        self._probe.reset()
        self._laps.begin()

    def pause(self) -> None:
        """The compute of the moment under way is over: what follows is a wait for the next one's chunk."""
        self._laps.end()

    def end(self, updates: bool) -> Trace:
        """The step is over; ``updates`` says whether an update follows.

        Waits for the device, to know how long it took.
        """
        self._close()
        timed = zip(self._moments[self._before :], self._laps.seconds(), strict=True)
        moments = [*self._moments[: self._before], *(replace(moment, seconds=s) for moment, s in timed)]
        return Trace(self._kind, tuple(moments), updates)

    def _close(self) -> None:
        if self._opened is None:
            return
        self._laps.end()
        other = max(self._device.work_peak, self._probe.peak() - self._counted) + self._foreign
        self._moments.append(replace(self._opened, other=other))
        self._opened = None
