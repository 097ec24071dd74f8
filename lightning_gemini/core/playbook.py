"""The steps that have been recorded, each with its plan."""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_gemini.core.forecast import Forecast
from lightning_gemini.core.step_plan import StepPlan
from lightning_gemini.core.trace import Trace

#: Recordings of one kind of step in a row none of which has been met again, after which no more are made.
_FUTILE = 6

#: Steps that are remembered; the one that was met longest ago goes.
_REMEMBERED = 16

#: Steps of one form whose times are remembered.
_TIMED = 64


@dataclass(eq=False)
class Known:
    """One recorded step; ``plan`` is ``None`` until there is one, ``forecast`` if speeds are not known.

    Attributes:
        times: seconds that steps by this plan took on this rank, from their first moment to that of the next step.
    """

    trace: Trace
    plan: StepPlan | None = None
    forecast: Forecast | None = None
    times: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMED))

    @property
    def predicted(self) -> float | None:
        """How many seconds a step is expected to take."""
        return None if self.forecast is None else self.forecast.seconds

    @property
    def measured(self) -> float | None:
        """The median of ``times``: a pause now and then, such as an evaluation, does not count."""
        times = tuple(self.times)  # a watchdog asks from another thread
        return statistics.median(times) if times else None

    def go_by(self, plan: StepPlan, forecast: Forecast | None) -> None:
        """Steps go by ``plan`` from now on, which may be the one that they went by."""
        if (plan, forecast) != (self.plan, self.forecast):
            self.times.clear()
        self.plan, self.forecast = plan, forecast

    def resident(self, at: int) -> set[int]:
        """The chunks that are unsharded, or coming, when moment number ``at`` begins, by the plan."""
        assert self.plan is not None
        resident = set(self.plan.start)
        for moment, evicted, started in zip(self.trace.order[:at], self.plan.evict, self.plan.prefetch, strict=False):
            resident = (resident - set(evicted)) | {moment, *started}
        return resident


class Playbook:
    """Remembers steps by their kind and by the order of their chunks, and guesses which one comes next.

    All that is decided here follows from the order of units alone, so it is the same on all ranks.
    """

    def __init__(self) -> None:
        self._known: list[Known] = []  # the one met last comes last
        self._last: Known | None = None
        self._after: dict[Known | None, Known] = {}
        self._unknown: set[str] = set()  # kinds whose next step is to be recorded
        self._futile: Counter[str] = Counter()
        self._timed: Known | None = None  # the step before the one under way, if it was followed
        self._began = 0.0

    @property
    def known(self) -> Sequence[Known]:
        """All steps that are remembered."""
        return tuple(self._known)

    def expect(self, kind: str | None = None) -> Known | None:
        """The step that will come next, of ``kind`` if that is known; ``None`` if there is no plan for it."""
        following = self._after.get(self._last, self._last)  # at first, the same again
        if kind is None:
            kind = following.trace.kind if following is not None else None
        if kind is None or kind in self._unknown:
            return None
        if following is not None and following.trace.kind == kind:
            return following
        return next((known for known in reversed(self._known) if known.trace.kind == kind), None)

    def worth_recording(self, kind: str) -> bool:
        """Whether a step of ``kind`` is likely to come in the same form again."""
        return self._futile[kind] < _FUTILE

    def with_order(self, kind: str, begun: Sequence[int]) -> Known | None:
        """A known step of ``kind`` that begins with the chunks of ``begun``."""
        for known in reversed(self._known):
            if known.trace.kind == kind and known.trace.order[: len(begun)] == tuple(begun):
                return known
        return None

    def same(self, kind: str, order: Sequence[int], updates: bool) -> Known | None:
        """The known step of ``kind`` that has this order from beginning to end, and an update after it or not."""
        for known in self._known:
            trace = known.trace
            if trace.kind == kind and trace.updates == updates and trace.order == tuple(order):
                return known
        return None

    def add(self, trace: Trace) -> Known:
        """Remembers a step that has been recorded."""
        self._unknown.discard(trace.kind)
        self._futile[trace.kind] += 1
        known = self.same(trace.kind, trace.order, trace.updates)
        if known is None:
            known = Known(trace)
        else:
            self._known.remove(known)
            known.trace = trace
        self._known.append(known)
        for forgotten in self._known[:-_REMEMBERED]:
            self._after = {a: b for a, b in self._after.items() if forgotten not in (a, b)}
        del self._known[:-_REMEMBERED]
        self._went(known)
        return known

    def begin(self, kind: str) -> Known | None:
        """A step of ``kind`` begins, so the one before is over with its update; what :meth:`expect` says of it."""
        now = time.perf_counter()
        if self._timed is not None:
            self._timed.times.append(now - self._began)
        self._timed, self._began = None, now
        return self.expect(kind)

    def followed(self, known: Known) -> None:
        """A step went as it was known."""
        self._timed = known
        self._futile[known.trace.kind] = 0
        if known in self._known:
            self._known.remove(known)
            self._known.append(known)
            self._went(known)

    def lost(self, kind: str) -> None:
        """A step of ``kind`` took more memory than any that is known: the next one is to be recorded."""
        self._unknown.add(kind)
        self._last = None

    def _went(self, known: Known) -> None:
        self._after[self._last] = known
        self._last = known
