"""Which chunks stay unsharded between two uses, and when the others begin to come back: pure plans.

This is offline caching with pieces of several sizes and costs in a cache whose size changes with time. Each chunk's
time between two uses is a *gap*; it stays resident through the gap or is unsharded again after it. Two algorithms
choose, and the better choice counts:

- Belady's rule, the farthest next use goes first, as in PatrickStar and Gemini (Belady, "A study of replacement
  algorithms for a virtual-storage computer", IBM Systems Journal 5 (1966)); where gaps that may be kept cross the end
  of the step, the best of a few cycles.
- the local-ratio 4-approximation for general caching of Bar-Noy, Bar-Yehuda, Freund, Naor and Schieber, "A unified
  approach to approximating resource allocation and scheduling", J. ACM 48 (2001): the cost of what it drops is at
  most four times the least, whatever the sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from itertools import pairwise

from lightning_gemini.core.trace import Trace

#: Beyond so many (gap, stretch it crosses) pairs the local-ratio algorithm takes seconds, and Belady's choice stands.
_MOST_CROSSINGS = 1_000_000

#: Cycles that Belady's rule runs through where chunks may stay over the end of the step; it settles in two or three.
_CYCLES = 4


@dataclass(frozen=True)
class Gap:
    """The time between two uses of a chunk that follow each other, the step's end and beginning included.

    Attributes:
        last: the last moment of the use before.
        need: the first moment of the use after; not behind ``last`` if the gap crosses the end of the step.
    """

    chunk: int
    last: int
    need: int

    @property
    def wraps(self) -> bool:
        """Whether the gap crosses the end of the step."""
        return self.need <= self.last

    def ranges(self, moments: int) -> tuple[tuple[int, int], ...]:
        """The moments between the uses, of a step of so many, as up to two ranges ``[start, stop)``; maybe none."""
        parts = ((self.last + 1, moments), (0, self.need)) if self.wraps else ((self.last + 1, self.need),)
        return tuple(part for part in parts if part[0] < part[1])


@dataclass(frozen=True)
class Gaps:
    """All gaps of a step: ``free`` may be kept; behind each of ``forced`` the chunk is unsharded in any case."""

    moments: int
    free: tuple[Gap, ...]
    forced: tuple[Gap, ...]


def find_gaps(trace: Trace, stale: Collection[int] = (), resident: Collection[int] = ()) -> Gaps:
    """The gaps of a step that repeats.

    Args:
        stale: chunks that change at the end of the step, so that a copy kept beyond it is worth nothing.
        resident: chunks that are always unsharded and have no gaps.
    """
    free: list[Gap] = []
    forced: list[Gap] = []
    for chunk, uses in trace.uses.items():
        if chunk in resident:
            continue
        free += [Gap(chunk, last, need) for (_, last), (need, _) in pairwise(uses)]
        around = Gap(chunk, uses[-1][1], uses[0][0])
        (forced if chunk in stale else free).append(around)
    return Gaps(len(trace.moments), tuple(free), tuple(forced))


class _Line:
    """The gaps on a line of stretches, in which no gap begins or ends, and what is still free in each stretch."""

    def __init__(self, gaps: Gaps, room: Sequence[int], size: Sequence[int], cost: Sequence[int]) -> None:
        ranges = [gap.ranges(gaps.moments) for gap in gaps.free]
        cuts = sorted({0, gaps.moments}.union(*(point for parts in ranges for point in parts)))
        place = {moment: index for index, moment in enumerate(cuts)}
        self.room = [min(room[start:stop]) for start, stop in pairwise(cuts)]
        self.free = list(self.room)
        self.parts = [tuple((place[start], place[stop]) for start, stop in parts) for parts in ranges]
        self.length = [sum(stop - start for start, stop in parts) for parts in self.parts]
        self.size = [size[gap.chunk] for gap in gaps.free]
        self.cost = [cost[gap.chunk] for gap in gaps.free]
        self.everything = range(len(ranges))
        #: gaps that compete for room, the worthiest first: the most bytes saved per byte and time
        self.contended = sorted(
            (i for i in self.everything if self.length[i] and self.size[i]),
            key=lambda i: (-self.cost[i] / (self.size[i] * self.length[i]), i),
        )

    @cached_property
    def crossings(self) -> int:
        return sum(self.length[i] for i in self.contended)

    def fits(self, i: int) -> bool:
        return all(min(self.free[start:stop]) >= self.size[i] for start, stop in self.parts[i])

    def take(self, i: int, size: int) -> None:
        """Takes ``size`` bytes, which may be negative, all through gap ``i``."""
        for start, stop in self.parts[i]:
            self.free[start:stop] = [free - size for free in self.free[start:stop]]

    def fill(self, dropped: Collection[int]) -> set[int]:
        """A maximal choice: ``dropped`` less what still fits, the worthiest first."""
        dropped = set(dropped)
        self.free = list(self.room)
        for i in self.contended:
            if i not in dropped:
                self.take(i, self.size[i])
        for i in self.contended:
            if i in dropped and self.fits(i):
                self.take(i, self.size[i])
                dropped.remove(i)
        return dropped

    def loss(self, dropped: Collection[int]) -> int:
        return sum(self.cost[i] for i in dropped)

    def crossing(self, order: Sequence[int]) -> list[list[int]]:
        """By stretch: the gaps that cross it, in ``order``."""
        crossing: list[list[int]] = [[] for _ in self.room]
        for i in order:
            for start, stop in self.parts[i]:
                for stretch in crossing[start:stop]:
                    stretch.append(i)
        return crossing


def choose_kept(
    gaps: Gaps, room: Sequence[int], size: Sequence[int], cost: Sequence[int], *, thorough: bool = True
) -> tuple[bool, ...]:
    """Which of ``gaps.free`` to stay resident through, at the least cost of the unshards that remain.

    The choice is maximal: nothing that is dropped could be kept as well. Where all sizes are equal and all costs are,
    Belady's rule decides alone: it is optimal if no free gap wraps, and was in all small instances tried where some
    do. Otherwise the choice costs at most four times the optimum, unless ``thorough`` is off or the instance is so
    large (more than a million pairs of a gap and a stretch) that Belady's rule decides there, too.

    Args:
        room: by moment, bytes for chunks that nobody uses.
        size: by chunk, bytes that it takes.
        cost: by chunk, what unsharding it once costs, in bytes.
        thorough: whether to ask the slower algorithm, too.

    Raises:
        ValueError: the room is negative somewhere.
    """
    if any(free < 0 for free in room):
        raise ValueError(f"the room must not be negative, got {min(room)} bytes in moment {room.index(min(room))}.")
    line = _Line(gaps, room, size, cost)
    best = line.fill(line.contended)
    if best:
        choices: list[Callable[[_Line], list[set[int]]]] = [_farthest_next_use]
        alike = len({(line.size[i], line.cost[i]) for i in line.contended}) == 1
        if thorough and not alike and line.crossings <= _MOST_CROSSINGS:
            choices.append(_local_ratio)
        for choice in choices:
            best = min(best, *(line.fill(dropped) for dropped in choice(line)), key=line.loss)
    return tuple(i not in best for i in line.everything)


def _farthest_next_use(line: _Line) -> list[set[int]]:
    """What Belady's rule drops, for each cycle from the one in which what came around from the last one counts."""
    stretches = len(line.room)
    begin: list[list[int]] = [[] for _ in line.room]
    for i in line.contended:
        begin[line.parts[i][0][0]].append(i)
    wrapping = [i for i in line.contended if line.parts[i][0][0] + line.length[i] > stretches]
    cycles = _CYCLES if wrapping else 1
    end: list[list[tuple[int, int]]] = [[] for _ in range((cycles + 1) * stretches + 1)]
    gone: list[dict[int, int]] = [{} for _ in range(cycles)]  # by cycle of its beginning: when a gap was dropped
    heap: list[tuple[int, int, int]] = []
    load = 0
    for now in range(cycles * stretches):
        cycle, stretch = divmod(now, stretches)
        load -= sum(line.size[i] for i, born in end[now] if i not in gone[born])
        for i in begin[stretch]:
            heappush(heap, (-now - line.length[i], i, cycle))
            end[now + line.length[i]].append((i, cycle))
            load += line.size[i]
        while load > line.room[stretch]:
            _, i, born = heappop(heap)
            gone[born][i] = now
            load -= line.size[i]
    if not wrapping:
        return [set(gone[0])]
    found = []
    for cycle in range(1, cycles):
        # a gap that comes around holds in its tail as it does in this cycle, in its head as the one begun before
        came_around = gone[cycle - 1].keys() & set(wrapping)
        found.append(came_around | {i for i, when in gone[cycle].items() if when < (cycle + 1) * stretches})
    return found


def _local_ratio(line: _Line) -> list[set[int]]:
    """What is dropped by the local-ratio algorithm of Bar-Noy et al., for the least loss.

    The penalty of everything that crosses the stretch with the largest excess shrinks in proportion to what dropping
    it would bring there; what has none left goes. At the end, what fits comes back, the last that went first.
    """
    crossing = line.crossing(line.contended)
    line.free = list(line.room)
    for i in line.contended:
        line.take(i, line.size[i])
    penalty = [float(cost) for cost in line.cost]
    dropped: set[int] = set()
    levels: list[list[int]] = []
    while (least := min(line.free)) < 0:
        stretch = line.free.index(least)
        here = crossing[stretch] = [i for i in crossing[stretch] if i not in dropped]
        weight = [min(-least, line.size[i]) for i in here]
        ratio = min(penalty[i] / w for i, w in zip(here, weight, strict=True))
        level = []
        for i, w in zip(here, weight, strict=True):
            penalty[i] -= ratio * w
            if penalty[i] <= 1e-9 * line.cost[i]:  # zero, but for rounding
                level.append(i)
                line.take(i, -line.size[i])
        dropped.update(level)
        levels.append(level)
    for level in reversed(levels):
        for i in level:
            if line.fits(i):
                line.take(i, line.size[i])
                dropped.remove(i)
    return [dropped]


def lower_bound(gaps: Gaps, room: Sequence[int], size: Sequence[int], cost: Sequence[int]) -> int:
    """Bytes that no choice can avoid: those of the forced unshards, and those of the tightest moments.

    Of the gaps that cross a moment only so many can be kept as its room holds, at best those that save the most per
    byte, the last one in part (a fractional knapsack). The moment that loses the most counts; then the same among the
    gaps that lie between it and itself a step later, and so on: no gap is counted twice. Arguments are those of
    :func:`choose_kept`.
    """
    line = _Line(gaps, room, size, cost)
    stretches = len(line.room)
    by_value = sorted(line.contended, key=lambda i: -line.cost[i] / line.size[i])
    lost = [_loss_at(line, free, here) for free, here in zip(line.room, line.crossing(by_value), strict=True)]
    bound = sum(cost[gap.chunk] for gap in gaps.forced)
    if not any(lost):
        return bound
    bound += max(lost)
    first = lost.index(max(lost))
    # counted from the first cut on, no other gap crosses the line's end
    begin = {i: (line.parts[i][0][0] - first) % stretches for i in by_value}
    pending = [(1, stretches, by_value)]
    while pending:
        low, high, inside = pending.pop()
        inside = [i for i in inside if low <= begin[i] and begin[i] + line.length[i] <= high]
        crossing: list[list[int]] = [[] for _ in range(low, high)]
        for i in inside:
            for stretch in crossing[begin[i] - low : begin[i] + line.length[i] - low]:
                stretch.append(i)
        lost = [_loss_at(line, line.room[(low + first + k) % stretches], here) for k, here in enumerate(crossing)]
        if any(lost):
            bound += max(lost)
            cut = low + lost.index(max(lost))
            pending += [(low, cut, inside), (cut + 1, high, inside)]
    return bound


def _loss_at(line: _Line, free: int, here: Sequence[int]) -> int:
    """The least cost of what goes of ``here``, the most valuable first, where ``free`` bytes may be divided at will."""
    lost = 0
    for i in here:
        if line.size[i] <= free:
            free -= line.size[i]
        else:
            lost += line.cost[i] - line.cost[i] * free // line.size[i]
            free = 0
    return lost


def prefetch_starts(
    unshards: Sequence[Gap], room: Sequence[int], size: Sequence[int], depth: int | None = None
) -> tuple[int | None, ...]:
    """For each unshard the moment behind whose acquire its copy may begin, as early as there is room for it.

    Copies run one after the other in the order of need, so no start precedes that of an earlier need, and none the
    end of the chunk's last use. A copy takes its room from the moment in which it starts.

    Args:
        unshards: the gaps at whose end an unshard is needed, by need.
        room: by moment, bytes beside what is pinned and what stays resident.
        size: by chunk, bytes that it takes.
        depth: the most copies that may have started ahead of their need; ``None`` for no bound.

    Returns:
        By unshard: a moment before its need, -1 for the time before the step's first moment, or ``None`` where there
        is no room ahead and the unshard begins when it is needed.
    """
    free = list(room)
    starts: list[int | None] = []
    earliest = -1
    for index, gap in enumerate(unshards):
        if not gap.wraps:
            earliest = max(earliest, gap.last + 1)
        if depth is not None and index >= depth:
            earliest = max(earliest, unshards[index - depth].need)
        nbytes, start = size[gap.chunk], gap.need
        while start > max(earliest, 0) and free[start - 1] >= nbytes:
            start -= 1
        if start == 0 and earliest < 0:
            start = -1
        for moment in range(max(start, 0), gap.need):
            free[moment] -= nbytes
        starts.append(start if start < gap.need else None)
        earliest = start
    return tuple(starts)
