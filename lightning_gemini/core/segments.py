"""Segments: the runs of a shard that an optimizer updates as one parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


@dataclass(eq=False)
class Segment:
    """A run of parameters of one chunk that have had gradients at the same steps, as far as this rank owns them.

    torch leaves a parameter without a gradient alone (no decay, no momentum, no step count), so parameters share
    optimizer state only as long as they get gradients together. At first a chunk's shard is one segment.

    Attributes:
        start, stop: the part of the shard, in elements from its beginning.
        slots: the slots of the chunk that lie in it, wholly or in part.
        state: the optimizer's state of it.
    """

    start: int
    stop: int
    slots: tuple[int, ...]
    state: State = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return self.stop - self.start


class SegmentedShard:
    """A chunk's shard, cut into segments.

    Args:
        spans: for each slot the part of the shard that holds it, empty where another rank does.
        device: where the shard is.
    """

    def __init__(self, spans: Sequence[range], device: torch.device) -> None:
        self._spans = spans
        self._device = device
        mine = [slot for slot, span in enumerate(spans) if len(span)]
        self.segments: list[Segment] = [self._segment(mine)] if mine else []

    def select(self, used: Sequence[bool]) -> list[Segment]:
        """The segments whose parameters are ``used`` (by slot); those that are so in part are split first."""
        split: list[Segment] = []
        for segment in self.segments:
            runs = [list(run) for _, run in groupby(segment.slots, key=lambda slot: used[slot])]
            split += [segment] if len(runs) == 1 else [self._part(segment, run) for run in runs]
        self.segments = split
        return [segment for segment in split if used[segment.slots[0]]]

    def slot_states(self) -> Iterator[tuple[int, range, State]]:
        """Each slot's part of the optimizer state: the slot, its span, and its state cut to the span."""
        for segment in self.segments:
            for slot in segment.slots:
                span = self._spans[slot]
                yield slot, span, _cut(segment, span.start, span.stop)

    def load(self, states: Mapping[int, State]) -> None:
        """Replaces the optimizer state by what ``states`` holds for each slot.

        Element-wise tensors must be 1-d and as long as the slot's span; everything else is taken as it is.
        """
        pieces = {slot: states.get(slot, {}) for slot, span in enumerate(self._spans) if len(span)}
        self.segments = []
        for _, run in groupby(pieces, key=lambda slot: _history(pieces[slot], len(self._spans[slot]))):
            segment = self._segment(list(run))
            first = segment.slots[0]
            for key, sample in pieces[first].items():
                if is_elementwise(sample, len(self._spans[first])):
                    segment.state[key] = self._join(segment, {slot: pieces[slot][key] for slot in segment.slots})
                else:
                    segment.state[key] = sample.clone() if isinstance(sample, Tensor) else sample
            self.segments.append(segment)

    def _join(self, segment: Segment, parts: Mapping[int, Tensor]) -> Tensor:
        dtype = parts[segment.slots[0]].dtype
        whole = torch.zeros(segment.numel, dtype=dtype, device=self._device)
        for slot, part in parts.items():
            span = self._spans[slot]
            whole[span.start - segment.start : span.stop - segment.start] = part
        return whole

    def _segment(self, slots: Sequence[int]) -> Segment:
        return Segment(self._spans[slots[0]].start, self._spans[slots[-1]].stop, tuple(slots))

    def _part(self, segment: Segment, slots: Sequence[int]) -> Segment:
        part = self._segment(slots)
        part.state = _cut(segment, part.start, part.stop)
        return part


def _cut(segment: Segment, start: int, stop: int) -> State:
    low, high = start - segment.start, stop - segment.start

    def cut(value: Any) -> Any:
        if is_elementwise(value, segment.numel):
            return value[low:high]
        return value.clone() if isinstance(value, Tensor) else value

    return {key: cut(value) for key, value in segment.state.items()}


def is_elementwise(value: Any, numel: int) -> bool:
    """Whether an optimizer's state value has one element for each of ``numel`` elements (flat)."""
    return isinstance(value, Tensor) and value.dim() == 1 and value.numel() == numel


def _history(state: State, numel: int) -> tuple[Any, ...]:
    """Equal for two parameters if their states differ in nothing but element-wise tensors."""
    return tuple(
        (
            key,
            None if is_elementwise(value, numel) else value.tolist() if isinstance(value, Tensor) else value,
        )
        for key, value in sorted(state.items())
    )
