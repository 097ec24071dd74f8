"""Segments: the runs of a shard that an optimizer updates as one parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_gemini.core.blocks import entries, grain, is_code_book, zero_code

State = dict[str, Any]


@dataclass(eq=False)
class Segment:
    """A run of parameters of one chunk that have had gradients at the same steps, as far as this rank owns them.

    torch leaves a parameter without a gradient alone (no decay, no momentum, no step count), so parameters share
    optimizer state only as long as they get gradients together. At first a chunk's shard is one segment, or one for
    each run of parameters with as many ``bits``.

    Attributes:
        start, stop: the part of the shard, in elements from its beginning.
        slots: the slots of the chunk that lie in it, wholly or in part.
        state: the optimizer's state of it.
        bits: of its states, where the optimizer has to be told (see ``blocks``); else 0.
    """

    start: int
    stop: int
    slots: tuple[int, ...]
    state: State = field(default_factory=dict)
    bits: int = 0

    @property
    def numel(self) -> int:
        return self.stop - self.start


class SegmentedShard:
    """A chunk's shard, cut into segments.

    Args:
        spans: for each slot the part of the shard that holds it, empty where another rank does.
        device: where the shard is.
        bits: for each slot, those of its states; no segment has slots with different ones.
    """

    def __init__(self, spans: Sequence[range], device: torch.device, bits: Sequence[int]) -> None:
        self._spans = spans
        self._device = device
        self._bits = bits
        mine = [slot for slot, span in enumerate(spans) if len(span)]
        self.segments = [self._segment(list(run)) for _, run in groupby(mine, key=lambda slot: bits[slot])]

    def select(self, used: Sequence[bool]) -> list[Segment]:
        """The segments whose parameters are ``used`` (by slot); those that are so in part are split first."""
        split: list[Segment] = []
        for segment in self.segments:
            runs = [list(run) for _, run in groupby(segment.slots, key=lambda slot: used[slot])]
            split += [segment] if len(runs) == 1 else [self._part(segment, run) for run in runs]
        self.segments = split
        return [segment for segment in split if used[segment.slots[0]]]

    def move(self, device: torch.device) -> None:
        """Copies the state to ``device``: what has an element or a block for each of the shard's, and code books."""
        states = [
            (segment.state, key, value)
            for segment in self.segments
            for key, value in segment.state.items()
            if isinstance(value, Tensor) and value.dim()
        ]
        moved: dict[int, Tensor] = {}  # by what it was: segments share code books
        with torch.inference_mode(False):
            for _, _, value in states:
                if id(value) not in moved:
                    moved[id(value)] = torch.empty_like(value, device=device).copy_(value)
        for state, key, value in states:
            state[key] = moved[id(value)]
        self._device = device

    def slot_states(self) -> Iterator[tuple[int, range, State]]:
        """Each slot's part of the optimizer state: the slot, its span, and its state cut to the span."""
        for segment in self.segments:
            for slot in segment.slots:
                span = self._spans[slot]
                yield slot, span, _cut(segment, span.start, span.stop)

    def load(self, states: Mapping[int, State], adopt: bool = False) -> None:
        """Replaces the optimizer state by what ``states`` holds for each slot.

        Element-wise tensors must be 1-d and as long as the slot's span, those for blocks likewise; everything else is
        taken as it is.

        Args:
            adopt: whether tensors are the shard's to keep. What lies in memory as it would here is not copied then;
                what lies between parameters there has to be zeros.
        """
        pieces = {slot: states.get(slot, {}) for slot, span in enumerate(self._spans) if len(span)}
        self.segments = []

        def history(slot: int) -> tuple[Any, ...]:
            return self._bits[slot], _history(pieces[slot], len(self._spans[slot]))

        for _, run in groupby(pieces, key=history):
            segment = self._segment(list(run))
            first = segment.slots[0]
            for key, sample in pieces[first].items():
                if size := grain(key, sample, len(self._spans[first])):
                    parts = {slot: pieces[slot][key] for slot in segment.slots}
                    whole = self._adopted(segment, parts) if adopt else None
                    if whole is None:
                        whole = self._join(segment, parts, size, zero_code(key, pieces[first]))
                    segment.state[key] = whole
                elif is_code_book(key):
                    segment.state[key] = self._code_book(sample)
                else:
                    segment.state[key] = sample.clone() if isinstance(sample, Tensor) else sample
            self.segments.append(segment)

    def _join(self, segment: Segment, parts: Mapping[int, Tensor], size: int, zero: int) -> Tensor:
        like = parts[segment.slots[0]]
        whole = like.new_full((*like.shape[:-1], -(-segment.numel // size)), zero, device=self._device)
        for slot, part in parts.items():
            span = self._spans[slot]
            whole[..., entries(span.start - segment.start, span.stop - segment.start, size)] = part
        return whole

    def _adopted(self, segment: Segment, parts: Mapping[int, Tensor]) -> Tensor | None:
        """The memory of ``parts`` as one tensor, if they lie in it as their slots do in the segment."""
        like = parts[segment.slots[0]]
        storage, origin = like.untyped_storage()._cdata, like.storage_offset() - segment.start
        for slot, part in parts.items():
            span = self._spans[slot]
            alike = part.dim() == 1 and part.dtype == like.dtype and part.device == self._device
            here = part.untyped_storage()._cdata == storage and part.storage_offset() == origin + span.start
            if not (alike and here and part.is_contiguous() and len(part) == len(span)):
                return None
        return like.as_strided((segment.numel,), (1,))

    def _code_book(self, sample: Tensor) -> Tensor:
        """``sample``, which checkpoints hold once for each parameter, once for all segments."""
        known = (value for segment in self.segments for key, value in segment.state.items() if is_code_book(key))
        return next((value for value in known if torch.equal(value.cpu(), sample.cpu())), sample.to(self._device))

    def _segment(self, slots: Sequence[int]) -> Segment:
        first, last = slots[0], slots[-1]
        return Segment(self._spans[first].start, self._spans[last].stop, tuple(slots), bits=self._bits[first])

    def _part(self, segment: Segment, slots: Sequence[int]) -> Segment:
        part = self._segment(slots)
        part.state = _cut(segment, part.start, part.stop)
        return part


def _cut(segment: Segment, start: int, stop: int) -> State:
    low, high = start - segment.start, stop - segment.start

    def cut(key: str, value: Any) -> Any:
        if size := grain(key, value, segment.numel):
            return value[..., entries(low, high, size)].contiguous()
        return value.clone() if isinstance(value, Tensor) and not is_code_book(key) else value

    return {key: cut(key, value) for key, value in segment.state.items()}


def _history(state: State, numel: int) -> tuple[Any, ...]:
    """Equal for two parameters if their states differ in nothing but what each element or block has of its own."""

    def common(key: str, value: Any) -> Any:
        if grain(key, value, numel):
            return value.dtype
        return value.tolist() if isinstance(value, Tensor) else value

    return tuple((key, common(key, value)) for key, value in sorted(state.items()))
