"""The moments of a step: which chunks are needed, in order, and what is in use meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise


@dataclass(frozen=True)
class Moment:
    """A stretch of a step: it begins when a unit needs a chunk that nobody is using, and ends when the next one does.

    Attributes:
        chunk: the chunk whose need begins the moment.
        reason: who needs it, for people: a unit's name, ``"the backward of ..."``.
        backward: whether that is in a backward.
        pinned: all chunks that are in use at some time during the moment, ``chunk`` among them, ascending.
        other: the most bytes on the device during the moment that are neither unsharded chunks nor homes: gradient
            buffers, activations.
        seconds: how long the moment's own computing takes, without any wait for a chunk.
    """

    chunk: int
    reason: str
    backward: bool
    pinned: tuple[int, ...]
    other: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Trace:
    """One step as it was seen.

    Attributes:
        kind: what kind of step it was: ``"training_step"``, ``"validation_step"``, ...
        moments: in order; the step repeats, so the first one follows the last.
        updates: whether an update of the trained chunks follows the step.

    Raises:
        ValueError: a moment's own chunk is not pinned in it, pinned chunks are not ascending, or a chunk is pinned
            that neither begins the moment nor was pinned in the one before.
    """

    kind: str
    moments: tuple[Moment, ...]
    updates: bool

    def __post_init__(self) -> None:
        before: tuple[int, ...] = ()
        for index, moment in enumerate(self.moments):
            if moment.chunk not in moment.pinned:
                raise ValueError(f"moment {index} begins with chunk {moment.chunk}, but pins only {moment.pinned}.")
            if any(first >= second for first, second in pairwise(moment.pinned)):
                raise ValueError(f"moment {index} must pin each chunk once, in ascending order, got {moment.pinned}.")
            for chunk in moment.pinned:
                if chunk != moment.chunk and chunk not in before:
                    raise ValueError(
                        f"moment {index} pins chunk {chunk}, which is not in use before it; "
                        "its need must begin a moment of its own."
                    )
            before = moment.pinned

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The chunk whose need begins each moment."""
        return tuple(moment.chunk for moment in self.moments)

    def same_order(self, other: Trace) -> bool:
        """Whether the same chunks are needed in the same order."""
        return self.order == other.order

    @cached_property
    def uses(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """By chunk, in the order of first need: the first and the last moment of each use, both included."""
        uses: dict[int, list[tuple[int, int]]] = {}
        for index, moment in enumerate(self.moments):
            for chunk in moment.pinned:
                if chunk == moment.chunk:
                    uses.setdefault(chunk, []).append((index, index))
                else:
                    uses[chunk][-1] = (uses[chunk][-1][0], index)
        return {chunk: tuple(spans) for chunk, spans in uses.items()}

    @cached_property
    def has_backward(self) -> bool:
        """Whether any moment belongs to a backward, so that gradients come of the step."""
        return any(moment.backward for moment in self.moments)

    @cached_property
    def condensed(self) -> Trace:
        """The same step with moments joined that follow each other, begin with the same chunk and pin the same ones."""
        joined: list[Moment] = []
        for moment in self.moments:
            before = joined[-1] if joined else None
            if before is None or (before.chunk, before.pinned) != (moment.chunk, moment.pinned):
                joined.append(moment)
                continue
            joined[-1] = replace(
                before,
                backward=before.backward or moment.backward,
                other=max(before.other, moment.other),
                seconds=before.seconds + moment.seconds,
            )
        return replace(self, moments=tuple(joined))


def merge(traces: Sequence[Trace]) -> Trace:
    """The same step as several ranks have seen it: in each moment the most of all that they saw.

    Raises:
        ValueError: there is no trace, or they differ in kind, in updates or in the order of chunks.
    """
    if not traces:
        raise ValueError("expected the traces of one or more ranks, got none.")
    first = traces[0]
    for rank, trace in enumerate(traces[1:], 1):
        if (trace.kind, trace.updates) != (first.kind, first.updates):
            raise ValueError(
                f"rank {rank} has seen a {trace.kind} with updates={trace.updates}, "
                f"rank 0 a {first.kind} with updates={first.updates}; merge traces of the same step."
            )
        if not first.same_order(trace):
            raise ValueError(_difference(first, trace, rank))
    return replace(
        first,
        moments=tuple(
            replace(
                same[0],
                pinned=tuple(sorted(set().union(*(moment.pinned for moment in same)))),
                other=max(moment.other for moment in same),
                seconds=max(moment.seconds for moment in same),
            )
            for same in zip(*(trace.moments for trace in traces), strict=True)
        ),
    )


def _difference(first: Trace, other: Trace, rank: int) -> str:
    for index, (ours, theirs) in enumerate(zip(first.moments, other.moments, strict=False)):
        if ours.chunk != theirs.chunk:
            return (
                f"moment {index} begins with chunk {ours.chunk} ({ours.reason}) on rank 0 and with chunk "
                f"{theirs.chunk} ({theirs.reason}) on rank {rank}; ranks must run the same units in the same order."
            )
    return (
        f"the step has {len(first.moments)} moments on rank 0 and {len(other.moments)} on rank {rank}; "
        "ranks must run the same units in the same order."
    )
