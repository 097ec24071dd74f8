"""How long a step will take by its plan: a simulation of copies, gathers, updates and compute side by side. Pure.

Each of these is one server that does its work in order: the compute stream, a lane for fetches and one for offloads,
gathers, and one thread that updates what has its home in host memory. The step repeats, and what counts is its steady
state. Reductions are not looked at, since homes do not change them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isclose

from lightning_gemini.core.speeds import Speeds
from lightning_gemini.core.step_plan import ChunkBytes, StepPlan
from lightning_gemini.core.trace import Trace
from lightning_gemini.core.worker import hidden_share

#: Steps that are simulated at the most; two or three are alike.
_STEPS = 6


@dataclass(frozen=True)
class Overlap:
    """What runs beside the compute; what does not holds it up.

    Attributes:
        copies: whether copies do, as on streams of their own; if not, offloads are part of the moments' seconds.
        updates: whether updates in host memory do, so that a unit waits for that of its own chunk only; if not, they
            follow those on the device.
    """

    copies: bool = True
    updates: bool = True


@dataclass(frozen=True)
class Forecast:
    """One step in its steady state, from its first moment to the first moment of the next one; in seconds.

    Attributes:
        seconds: the whole of it, which is the sum of compute, device updates and waits.
        compute: all moments' own computing.
        device_update: updates on the device.
        host_update: updates in host memory.
        waited_fetch: compute waits for copies and gathers.
        waited_update: compute waits for updates in host memory.
        speeds: with which this was computed.
    """

    seconds: float
    compute: float
    device_update: float
    host_update: float
    waited_fetch: float
    waited_update: float
    speeds: Speeds

    @property
    def update_hidden_share(self) -> float | None:
        """The share of the updates in host memory that nothing waits for, from 0 to 1; ``None`` if there are none."""
        return hidden_share(self.host_update, self.waited_update)


def forecast(
    trace: Trace,
    plan: StepPlan,
    on_device: Sequence[bool],
    chunks: Sequence[ChunkBytes],
    speeds: Speeds,
    overlap: Overlap = Overlap(),
) -> Forecast:
    """How long each of many steps of one kind takes, the one after the other.

    A moment begins when the one before is over and its chunk is there. A copy to the device begins when the compute
    stream has come to the point where the plan has it, the lane is free and the chunk is updated; its gather follows.
    A chunk's gradient leaves after its last use. Updates begin when the backward is over; those in host memory, which
    go in the order in which the step needs the chunks, when the last gradient has landed, too.

    Args:
        trace: the step, with its moments' seconds.
        plan: what is kept, freed and fetched when, for these homes.
        on_device: by chunk, whether its home is the device.
    """
    line = _Line(trace, plan, on_device, chunks, speeds, overlap)
    before = line.step()
    for _ in range(_STEPS):
        now = line.step()
        if isclose(now.seconds, before.seconds, rel_tol=1e-9):
            break
        before = now
    waited_fetch, waited_update, seconds = now.waited_fetch, now.waited_update, now.seconds
    # where one server has more to do than a step takes, it holds up all steps in the end
    bounds = (line.fetch, line.offload, line.gather)
    if line.host_update > max(seconds, *bounds):
        waited_update += line.host_update - seconds
    elif max(bounds) > seconds:
        waited_fetch += max(bounds) - seconds
    return Forecast(
        seconds=line.compute + line.device_update + waited_fetch + waited_update,
        compute=line.compute,
        device_update=line.device_update,
        host_update=line.host_update,
        waited_fetch=waited_fetch,
        waited_update=waited_update,
        speeds=speeds,
    )


@dataclass(frozen=True)
class _Step:
    seconds: float
    waited_fetch: float
    waited_update: float


@dataclass
class _Action:
    """Something that happens where a moment begins or ends.

    Attributes:
        after: seconds of compute since the action before.
        demanded: the chunk whose unshard begins only now, as the compute needs it; -1 for none.
        awaited: the chunk that compute waits for; -1 for none.
        brought: chunks whose unshards begin then.
        left: chunks whose gradients begin to leave before all that.
    """

    after: float
    demanded: int = -1
    awaited: int = -1
    brought: tuple[int, ...] = ()
    left: list[int] = field(default_factory=list)


class _Line:
    """All servers, and what they have to do in one step; times count from the beginning of the first."""

    def __init__(
        self,
        trace: Trace,
        plan: StepPlan,
        on_device: Sequence[bool],
        chunks: Sequence[ChunkBytes],
        speeds: Speeds,
        overlap: Overlap,
    ) -> None:
        self._overlap, self._updates = overlap, trace.updates
        self._fetch = [0.0 if home else c.fetch / speeds.fetch for home, c in zip(on_device, chunks, strict=True)]
        self._gather = [c.gather / speeds.gather if speeds.gather else 0.0 for c in chunks]
        self._offload = [c.offload / speeds.offload if overlap.copies else 0.0 for c in chunks]
        self._update = [c.elements / speeds.host_update for c in chunks]
        updated = [c for c in trace.uses if trace.updates and chunks[c].elements]
        self._hosted = [c for c in updated if not on_device[c]]
        leaving = [c for c in trace.uses if trace.has_backward and not on_device[c] and chunks[c].offload]
        self._begin, self._actions, self._rest = _actions(trace, plan, on_device, chunks, leaving)
        unsharded = [*self._begin, *(c for a in self._actions for c in (*a.brought, a.demanded) if c >= 0)]
        self.compute = sum(moment.seconds for moment in trace.moments)
        self.device_update = sum(chunks[c].elements for c in updated if on_device[c]) / speeds.device_update
        self.host_update = sum(self._update[c] for c in self._hosted)
        self.fetch = sum(self._fetch[c] for c in unsharded)
        self.gather = sum(self._gather[c] for c in unsharded)
        self.offload = sum(self._offload[c] for c in leaving)
        # when each server is free, and when chunks are updated and there
        self._now = self._fetched = self._gathered = self._offloaded = self._worked = 0.0
        self._work_began = 0.0  # of the latest updates in host memory
        self._gate = 0.0  # the end of those that copies wait for
        self._updated: dict[int, float] = {}
        self._there: dict[int, tuple[float, float]] = {}
        self._waited_fetch = self._waited_update = 0.0

    def step(self) -> _Step:
        """Goes through one more step."""
        began = self._now
        self._waited_fetch = self._waited_update = 0.0
        for chunk in self._begin:
            self._bring(chunk)
        for action in self._actions:
            self._now += action.after
            for chunk in action.left:
                self._offloaded = max(self._offloaded, self._now) + self._offload[chunk]
            if action.demanded >= 0:
                self._bring(action.demanded)
            if action.awaited in self._there:
                self._wait(*self._there.pop(action.awaited))
            for chunk in action.brought:
                self._bring(chunk)
        self._now += self._rest
        self._end()
        return _Step(self._now - began, self._waited_fetch, self._waited_update)

    def _end(self) -> None:
        if not self._updates:
            self._wait(self._offloaded, 0.0)  # the next gradients are added to those that leave
            return
        over = self._now
        self._now += self.device_update
        self._gate = 0.0
        if not self._hosted:
            return
        self._worked = max(self._worked, self._offloaded, over if self._overlap.updates else self._now)
        self._work_began = self._worked
        for chunk in self._hosted:
            self._worked += self._update[chunk]
            self._updated[chunk] = self._worked
        if not self._overlap.updates:
            self._wait(self._worked, self._worked)

    def _bring(self, chunk: int) -> None:
        updated = self._updated.pop(chunk, 0.0)
        self._gate = max(self._gate, updated)
        if self._overlap.copies:
            self._fetched = max(self._fetched, self._now, updated) + self._fetch[chunk]
            there = self._fetched
        elif updated and self._overlap.updates:
            there = updated + self._fetch[chunk]  # copied by the thread that has updated it
        else:
            self._wait(self._now + self._fetch[chunk], 0.0)
            there = self._now
        if self._gather[chunk]:
            there = self._gathered = max(self._gathered, there) + self._gather[chunk]
        self._there[chunk] = there, self._gate

    def _wait(self, until: float, gate: float) -> None:
        """Compute waits ``until`` then; up to ``gate``, as soon as updates have begun, for these, else for copies."""
        waited = max(until - self._now, 0.0)
        for_update = min(max(gate - max(self._now, self._work_began), 0.0), waited)
        self._waited_update += for_update
        self._waited_fetch += waited - for_update
        self._now += waited


def _actions(
    trace: Trace, plan: StepPlan, on_device: Sequence[bool], chunks: Sequence[ChunkBytes], leaving: Sequence[int]
) -> tuple[tuple[int, ...], list[_Action], float]:
    """What is unsharded at the beginning of each step but the first, what happens later, the compute after that."""
    whole = {index for index, chunk in enumerate(chunks) if on_device[index] and chunk.whole}
    stale = {index for index, chunk in enumerate(chunks) if chunk.trained} if trace.updates else set()
    last: dict[int, list[int]] = {}
    for chunk in leaving:
        last.setdefault(trace.uses[chunk][-1][1] + 1, []).append(chunk)
    begin: tuple[int, ...] = ()
    actions: list[_Action] = []
    after = 0.0
    resident: set[int] = set()
    for _ in range(2):  # what stays over the end of the step is known after the first
        resident = (resident - stale) & set(plan.start)
        begin = tuple(chunk for chunk in plan.start if chunk not in resident)
        resident |= set(begin)
        awaited = set(begin)
        actions, after = [], 0.0
        for index, moment in enumerate(trace.moments):
            resident.difference_update(plan.evict[index])
            late = moment.chunk not in resident and moment.chunk not in whole
            brought, left = plan.prefetch[index], last.get(index, [])
            if late or brought or left or moment.chunk in awaited:
                needed = late or moment.chunk in awaited
                actions.append(
                    _Action(after, moment.chunk if late else -1, moment.chunk if needed else -1, brought, left)
                )
                after = 0.0
            awaited.discard(moment.chunk)
            awaited.update(brought)
            resident.add(moment.chunk)
            resident.update(brought)
            after += moment.seconds
        resident -= whole
    if left := last.get(len(trace.moments), []):
        actions.append(_Action(after, left=left))
        after = 0.0
    return begin, actions, after
