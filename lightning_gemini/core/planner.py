"""Where chunks live and when they move, planned ahead from the traces of the steps: pure.

Device memory is worth the most where it keeps unsharded chunks from one use to the next, such as through the turn from
forward to backward: a bf16 chunk takes 2 bytes per parameter there. A home on the device, with master, optimizer states
and gradient, takes about 14 and saves two fetches and an offload. So the number of homes on the device is searched, and
each number is judged by what still has to move once the rest of the memory keeps chunks (:mod:`residency`). Where
speeds are known, it is judged by the time that a step will take (:mod:`forecast`): then homes on the device are worth
what they save of updates in host memory, too, and bytes that move beside the compute cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from lightning_gemini.core.errors import GeminiError
from lightning_gemini.core.forecast import Overlap, forecast
from lightning_gemini.core.homes import FEW_CHUNKS, Homes, Rating, nested_homes, search_homes
from lightning_gemini.core.memory import format_bytes
from lightning_gemini.core.residency import Gap, Gaps, choose_kept, find_gaps, lower_bound, prefetch_starts
from lightning_gemini.core.speeds import Speeds
from lightning_gemini.core.step_plan import ChunkBytes, Plan, StepPlan
from lightning_gemini.core.trace import Trace

#: Steps that differ by less than their compute divided by this are alike: no prediction is better.
_ALIKE = 100


class DoesNotFitError(GeminiError):
    """What has to be in memory at one time does not fit it.

    Attributes:
        budget: ``"device"`` or ``"host"``.
        trace, moment: where, by index; ``None`` for the host, whose content does not change within a step.
        needed, available: bytes, ``needed`` the least that would do with the homes asked for.
    """

    def __init__(
        self, budget: Literal["device", "host"], needed: int, available: int, trace: int | None, moment: int | None
    ) -> None:
        where = "" if trace is None else f" in moment {moment} of trace {trace}"
        super().__init__(
            f"{format_bytes(needed)} of {budget} memory are needed at least{where}, "
            f"but {format_bytes(available)} may be used."
        )
        self.budget = budget
        self.needed, self.available = needed, available
        self.trace, self.moment = trace, moment


def plan(
    traces: Sequence[Trace],
    chunks: Sequence[ChunkBytes],
    device: int | None,
    host: int | None,
    *,
    homes: Literal["auto", "host", "device"] | Sequence[bool],
    window: int | None = None,
    depth: int | None = None,
    speeds: Speeds | None = None,
    overlap: Overlap = Overlap(),  # noqa: B008, it is frozen
) -> Plan:
    """Homes of all chunks, and for each trace what to keep, free and fetch ahead.

    ``"auto"`` searches the homes that move the fewest bytes over the traces that update (over all, if none does), all
    kinds of bytes together; of equal ones those with the most homes on the device. It does not fetch more in these
    traces than ``"host"`` would, if ``"host"`` is possible, and never fails where all homes in host memory fit.

    With ``speeds`` those of the fewest seconds count, as :func:`forecast.forecast` predicts them for these traces; of
    those that differ by less than a hundredth of the compute the ones that move the fewest bytes. They are never
    slower, as predicted, than those of the fewest bytes.

    Args:
        traces: one for each kind of step; a step is followed by one of its own kind.
        chunks: by index as in the traces.
        device: bytes of device memory; each moment's ``other`` and the homes there are part of it. ``None``: no bound.
        host: bytes of host memory. ``None``: no bound.
        homes: where chunks live: chosen, none or all on the device, or as given by chunk.
        window: the most bytes beside those in use that may be unsharded in chunks with a home elsewhere.
        depth: the most chunks that may be under way or waiting ahead of their need. ``None``: no bound.
        speeds: of copies and updates, for ``"auto"``; ``None`` to judge by bytes.
        overlap: what runs beside the compute.

    Raises:
        DoesNotFitError: a moment does not fit the device, or the homes that are left do not fit the host.
        ValueError: ``homes`` is another word, or not one flag for each chunk.
    """
    planner = _Planner(traces, chunks, device, host, window, depth)
    if homes == "auto":
        fewest = planner.search()
        return fewest if speeds is None else planner.search_time(fewest, speeds, overlap)
    given = _expand(homes, len(chunks))
    planner.check(given)
    return planner.plan(given)


def _expand(homes: str | Sequence[bool], count: int) -> Homes:
    if isinstance(homes, str):
        if homes not in ("host", "device"):
            raise ValueError(f"homes must be 'auto', 'host', 'device' or a flag for each chunk, got {homes!r}.")
        return (homes == "device",) * count
    if len(homes) != count:
        raise ValueError(f"homes must have a flag for each of {count} chunks, got {len(homes)}.")
    return tuple(bool(home) for home in homes)


class _Planner:
    """The instance, and what is asked of it again and again."""

    def __init__(
        self,
        traces: Sequence[Trace],
        chunks: Sequence[ChunkBytes],
        device: int | None,
        host: int | None,
        window: int | None,
        depth: int | None,
    ) -> None:
        self.traces, self.chunks = tuple(traces), tuple(chunks)
        #: the same with fewer moments, for what is asked of many homes
        self.short = tuple(trace.condensed for trace in traces)
        # where there is no bound, one that everything fits at once
        other = max((moment.other for trace in traces for moment in trace.moments), default=0)
        self.device = sum(c.kept + c.full for c in chunks) + other if device is None else device
        self.host = sum(c.hosted for c in chunks) if host is None else host
        self.window, self.depth = window, depth
        self.size = [chunk.full for chunk in chunks]
        self.trained = frozenset(index for index, chunk in enumerate(chunks) if chunk.trained)
        #: the traces whose bytes count, by index
        self.counted = [i for i, trace in enumerate(traces) if trace.updates] or list(range(len(traces)))
        self.all_hosted: Homes = (False,) * len(chunks)

    # What fits

    def pinned(self, trace: Trace, homes: Homes) -> list[int]:
        """By moment: bytes of unsharded chunks in use that are no homes."""
        size = [0 if home and c.whole else c.full for home, c in zip(homes, self.chunks, strict=True)]
        return [sum([size[chunk] for chunk in moment.pinned]) for moment in trace.moments]

    def settled(self, homes: Homes) -> int:
        """Bytes of the homes on the device."""
        return sum(c.kept for c, home in zip(self.chunks, homes, strict=True) if home)

    def hosted(self, homes: Homes) -> int:
        """Bytes of the homes in host memory."""
        return sum(c.hosted for c, home in zip(self.chunks, homes, strict=True) if not home)

    def lack(self, homes: Homes, traces: Sequence[Trace]) -> tuple[int, int | None, int | None]:
        """Device bytes that the fullest moment lacks, or has left if negative; its trace's index and its own."""
        settled = self.settled(homes)
        worst: tuple[int, int | None, int | None] = (settled - self.device, None, None)
        for index, trace in enumerate(traces):
            needed = [n + m.other for n, m in zip(self.pinned(trace, homes), trace.moments, strict=True)]
            if needed and settled + max(needed) - self.device > worst[0]:
                worst = (settled + max(needed) - self.device, index, needed.index(max(needed)))
        return worst

    def check(self, homes: Homes, host: bool = True) -> None:
        """Raises :class:`DoesNotFitError` if these homes are impossible."""
        lack, trace, moment = self.lack(homes, self.traces)
        if lack > 0:
            raise DoesNotFitError("device", self.device + lack, self.device, trace, moment)
        if host and self.hosted(homes) > self.host:
            raise DoesNotFitError("host", self.hosted(homes), self.host, None, None)

    # One choice of homes

    def plan(self, homes: Homes) -> Plan:
        """What to do with these homes."""
        return Plan(homes, tuple(self.step(trace, homes) for trace in self.traces))

    def step(self, trace: Trace, homes: Homes, rough: bool = False) -> StepPlan:
        """What to do in one trace's steps with these homes; if it may be ``rough``, without the least and quickly."""
        gaps, room, cost = self.instance(trace, homes)
        starts, free = self.movement(gaps, room, cost, thorough=not rough)
        evict: list[list[int]] = [[] for _ in trace.moments]
        prefetch: list[list[int]] = [[] for _ in trace.moments]
        for gap, start in starts.items():
            if gap.last + 1 < gaps.moments:
                evict[gap.last + 1].append(gap.chunk)
            if start is not None and start >= 0:
                prefetch[start].append(gap.chunk)
        begin = [gap for gap in (*gaps.free, *gaps.forced) if gap.wraps and starts.get(gap, -1) == -1]
        settled, pinned = self.settled(homes), self.pinned(trace, homes)
        fetched, gathered, offloaded = self.moved(trace, homes, starts)
        return StepPlan(
            start=tuple(gap.chunk for gap in sorted(begin, key=lambda gap: gap.need)),
            evict=tuple(tuple(sorted(chunks)) for chunks in evict),
            prefetch=tuple(tuple(chunks) for chunks in prefetch),
            fetched=fetched,
            gathered=gathered,
            offloaded=offloaded,
            least=0 if rough else lower_bound(gaps, room, self.size, cost),
            peak=tuple(settled + n + r - f for n, r, f in zip(pinned, room, free, strict=True)),
        )

    def movement(
        self, gaps: Gaps, room: Sequence[int], cost: Sequence[int], thorough: bool
    ) -> tuple[dict[Gap, int | None], list[int]]:
        """The unshards that remain, by need, and when their copies start; and the room that is left in each moment."""
        dropped = self.drop(gaps, room, cost, thorough)
        unshards = sorted([*dropped, *gaps.forced], key=lambda gap: gap.need)
        free = list(room)
        for gap in set(gaps.free) - dropped:
            self.occupy(free, gap, gap.need)
        starts = dict(zip(unshards, prefetch_starts(unshards, free, self.size, self.depth), strict=True))
        for gap, start in starts.items():
            for moment in range(gap.need if start is None else max(start, 0), gap.need):
                free[moment] -= self.size[gap.chunk]
        for gap in unshards:  # one that could stay until its copy starts needs no copy
            start = starts[gap]
            until = gap.need if start is None else max(start, 0)
            if gap in dropped and all(
                self.size[gap.chunk] <= min(free[first:stop])
                for first, stop in replace(gap, need=until).ranges(gaps.moments)
            ):
                self.occupy(free, gap, until)
                del starts[gap]
        return starts, free

    def occupy(self, free: list[int], gap: Gap, until: int) -> None:
        """Takes the room of ``gap`` from its beginning to moment ``until``."""
        for first, stop in replace(gap, need=until).ranges(len(free)):
            free[first:stop] = [nbytes - self.size[gap.chunk] for nbytes in free[first:stop]]

    def drop(self, gaps: Gaps, room: Sequence[int], cost: Sequence[int], thorough: bool) -> set[Gap]:
        """The gaps that are not kept; if there are any, each moment has room for the next unshard, where possible."""
        kept = choose_kept(gaps, room, self.size, cost, thorough=False)
        dropped = {gap for gap, keep in zip(gaps.free, kept, strict=True) if not keep}
        if dropped:
            reserved, begin = list(room), 0
            for gap in sorted([*dropped, *gaps.forced], key=lambda gap: gap.need):
                size = self.size[gap.chunk]
                reserved[begin : gap.need] = [n - size if n >= size else n for n in room[begin : gap.need]]
                begin = gap.need
            kept = choose_kept(gaps, reserved, self.size, cost, thorough=thorough)
        return {gap for gap, keep in zip(gaps.free, kept, strict=True) if not keep}

    def instance(self, trace: Trace, homes: Homes) -> tuple[Gaps, list[int], list[int]]:
        """The gaps; by moment, bytes for unsharded chunks that nobody uses; by chunk, bytes of one unshard."""
        whole = {index for index, chunk in enumerate(self.chunks) if homes[index] and chunk.whole}
        gaps = find_gaps(trace, self.trained if trace.updates else (), whole)
        limit, pinned = self.device - self.settled(homes), self.pinned(trace, homes)
        room = [limit - moment.other - nbytes for moment, nbytes in zip(trace.moments, pinned, strict=True)]
        if self.window is not None:
            room = [min(free, self.window) for free in room]
        return gaps, room, [c.gather + (0 if home else c.fetch) for c, home in zip(self.chunks, homes, strict=True)]

    def moved(self, trace: Trace, homes: Homes, unshards: Iterable[Gap]) -> tuple[int, int, int]:
        """Bytes that are fetched, gathered and offloaded in a step."""
        chunks = [gap.chunk for gap in unshards]
        return (
            sum(self.chunks[chunk].fetch for chunk in chunks if not homes[chunk]),
            sum(self.chunks[chunk].gather for chunk in chunks),
            sum(self.chunks[chunk].offload for chunk in trace.uses if not homes[chunk]) if trace.has_backward else 0,
        )

    # The search for homes

    def search(self) -> Plan:
        """The plan with the best homes that were found."""
        self.check(self.all_hosted, host=False)
        best = most = None
        if self.allowed(self.all_hosted):
            best = self.plan(self.all_hosted)
            most = sum(best.steps[index].fetched for index in self.counted)

        def rate(homes: Homes) -> Rating | None:
            rating, fetched = self.estimate(homes)
            return rating if most is None or fetched <= most else None

        orders = self.orders()
        for homes in search_homes(orders, self.fits, self.allowed, rate):
            found = self.plan(homes)
            fetched = sum(found.steps[index].fetched for index in self.counted)
            if (most is None or fetched <= most) and (best is None or self.rating(found) < self.rating(best)):
                best = found
        if best is None:
            least = min(self.hosted(nested_homes(order, self.fits)[-1]) for order in orders)
            raise DoesNotFitError("host", least, self.host, None, None)
        return best

    def search_time(self, fewest: Plan, speeds: Speeds, overlap: Overlap) -> Plan:
        """The plan of the fewest seconds that was found; of equal ones, and before ``fewest`` bytes, that one."""
        compute = sum(moment.seconds for index in self.counted for moment in self.traces[index].moments)
        unit = compute / _ALIKE or 1e-9

        def rate(plan: Plan, traces: Sequence[Trace]) -> Rating:
            pairs = [(traces[index], plan.steps[index]) for index in self.counted]
            seconds = sum(forecast(*pair, plan.on_device, self.chunks, speeds, overlap).seconds for pair in pairs)
            return round(seconds / unit), *self.rating(plan)

        def rough(homes: Homes) -> Rating:
            return rate(Plan(homes, tuple(self.step(trace, homes, rough=True) for trace in self.short)), self.short)

        known = sorted(range(len(self.chunks)), key=lambda chunk: not fewest.on_device[chunk])
        found = search_homes([*self.orders(), known], self.fits, self.allowed, rough)
        return min([fewest, *map(self.plan, found)], key=lambda plan: rate(plan, self.traces))

    def fits(self, homes: Homes) -> bool:
        """Whether the device holds every moment with these homes."""
        return self.lack(homes, self.short)[0] <= 0

    def allowed(self, homes: Homes) -> bool:
        """Whether the host holds the homes that are left to it."""
        return self.hosted(homes) <= self.host

    def rating(self, plan: Plan) -> Rating:
        """All bytes moved, then those of unshards, then more homes on the device."""
        steps = [plan.steps[index] for index in self.counted]
        return (sum(s.moved for s in steps), sum(s.fetched + s.gathered for s in steps), -sum(plan.on_device))

    def estimate(self, homes: Homes) -> tuple[Rating, int]:
        """About what :meth:`rating` will be, and the bytes that are fetched, without the whole plan."""
        fetched = gathered = offloaded = 0
        for trace in (self.short[index] for index in self.counted):
            gaps, room, cost = self.instance(trace, homes)
            dropped = self.drop(gaps, room, cost, thorough=len(homes) <= FEW_CHUNKS)
            moved = self.moved(trace, homes, [*dropped, *gaps.forced])
            fetched, gathered, offloaded = fetched + moved[0], gathered + moved[1], offloaded + moved[2]
        return (fetched + gathered + offloaded, fetched + gathered, -sum(homes)), fetched

    def orders(self) -> list[list[int]]:
        """All chunks by what a home on the device saves per byte that it takes, those of equal worth by first use.

        One order counts every unshard that may ever be, equal chunks from the front or from the back; one counts
        those that remain where all homes are in host memory; one asks what is saved, not per byte. If all homes do
        not fit in host memory, one has the largest first.
        """
        possible, remaining = [0] * len(self.chunks), [0] * len(self.chunks)
        first: dict[int, int] = {}
        for trace in (self.short[index] for index in self.counted):
            gaps, room, cost = self.instance(trace, self.all_hosted)
            dropped = self.drop(gaps, room, cost, thorough=False)
            for chunk in trace.uses:
                first.setdefault(chunk, len(first))
                if trace.has_backward:
                    possible[chunk] += self.chunks[chunk].offload
                    remaining[chunk] += self.chunks[chunk].offload
            for gap in (*gaps.forced, *(gap for gap in gaps.free if gap.ranges(gaps.moments))):
                possible[gap.chunk] += self.chunks[gap.chunk].fetch
            for gap in (*dropped, *gaps.forced):
                remaining[gap.chunk] += self.chunks[gap.chunk].fetch

        everything = range(len(self.chunks))
        rank = [first.get(chunk, len(first)) for chunk in everything]
        size = [max(chunk.kept, 1) for chunk in self.chunks]
        orders = [
            sorted(everything, key=lambda c: (-possible[c] / size[c], rank[c])),
            sorted(everything, key=lambda c: (-possible[c] / size[c], -rank[c])),
            sorted(everything, key=lambda c: (-remaining[c] / size[c], rank[c])),
            sorted(everything, key=lambda c: (-possible[c], rank[c])),
        ]
        if not self.allowed(self.all_hosted):
            orders.append(sorted(everything, key=lambda c: -self.chunks[c].hosted))
        return [order for index, order in enumerate(orders) if order not in orders[:index]]
