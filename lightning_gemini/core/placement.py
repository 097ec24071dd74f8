"""Where chunks have their homes and what steps go by: plans whenever a step has been recorded, and moves what has to.

NOTE: agreement.
Plans are made from the same numbers on all ranks: of each moment the most memory that any rank has seen, of each budget
the smallest, of each speed the slowest. So all ranks keep, free and prefetch the same chunks, and nothing but recorded
steps and, once, speeds are exchanged.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from lightning_gemini.core.chunk import Chunk, Home
from lightning_gemini.core.chunk_gradient import ChunkGradient, GradientState
from lightning_gemini.core.course import Course
from lightning_gemini.core.errors import OutOfBudgetError
from lightning_gemini.core.footprint import Footprints
from lightning_gemini.core.forecast import Forecast, Overlap, forecast
from lightning_gemini.core.gradients import Gradients
from lightning_gemini.core.planner import DoesNotFitError, plan
from lightning_gemini.core.refusal import (
    activations_do_not_fit,
    device_cannot_shrink,
    device_is_full,
    warn_of_shortage,
)
from lightning_gemini.core.schedule import Schedule
from lightning_gemini.core.speedometer import exchange
from lightning_gemini.core.speeds import Speeds
from lightning_gemini.core.step_plan import ChunkBytes, Plan, StepPlan
from lightning_gemini.core.store import Store
from lightning_gemini.core.trace import Moment, Trace, merge

#: Unsharded chunks beside those in use where the device is to hold little: one that comes, and two that are idle.
_WINDOW_CHUNKS = 3

#: Updates in host memory that are predicted to take at most this part of a step's compute are waited for by the next
#: gathers. It is small because speeds are measured in the processor's cache: updates of small chunks, in a step, can
#: take ten times as long.
_SHORT_UPDATE = 0.01

#: The part of the budget that goes, at least, when memory runs out.
_LEAST_CUT = 20


@dataclass(frozen=True)
class PlacementPolicy:
    """What the plans may do.

    Attributes:
        homes: ``"auto"`` moves homes to where they save the most; ``"fixed"`` leaves them where they are.
        narrow: whether the device is to hold little beside what is in use, however much room there is.
        depth: the most chunks that are fetched ahead of their need, ``None`` for as many as there is room for.
        speeds: of copies and updates, instead of what is measured; equal on all ranks.
    """

    homes: Literal["auto", "fixed"] = "auto"
    narrow: bool = False
    depth: int | None = None
    speeds: Speeds | None = None


class Placement:
    """Plans for one engine.

    Args:
        store: the chunks.
        schedule: what follows the plans.
        gradients: those of the chunks.
        footprints: what chunks take.
        policy: what the plans may do.
        trains: whether there are optimizers, so that homes wait for the first training step.
    """

    def __init__(
        self,
        store: Store,
        schedule: Schedule,
        gradients: Gradients,
        footprints: Footprints,
        policy: PlacementPolicy,
        trains: bool,
    ) -> None:
        self._store = store
        self._schedule = schedule
        self._playbook = schedule.playbook
        self._gradients = gradients
        self._footprints = footprints
        self._policy = policy
        self._trains = trains
        self._accumulating = False
        emulated = store.device.device.type == "cpu"
        self._speeds = policy.speeds
        # There a copy and an update are work of the same memory, and plans are to be the same in each run.
        self._by_time = policy.speeds is not None or not emulated
        in_background = trains and footprints.ruled and store.host_updates.possible
        self._overlap = Overlap(copies=not emulated, updates=in_background)
        # On a GPU the first step also loads kernels and chooses between them: its times say little.
        self._cold = policy.speeds is None and not emulated
        self._told_of_shortage = False
        self._agreed = [chunk.home is not Home.HOST for chunk in store.chunks]  # a rank may have fewer on the device
        schedule.relief = self
        store.device.refusal = self._refusal
        self._set_limit()

    def recorded(self, trace: Trace, accumulating: bool) -> None:
        """A step has been recorded: agrees on it with the other ranks, which call too, and plans anew.

        Args:
            accumulating: whether the step kept gradients in fp32.

        Raises:
            OutOfBudgetError: it takes more than there is, wherever chunks have their homes; on all ranks.
        """
        self._accumulating |= accumulating
        trace = self._with_reserve(merge(self._exchange(trace)))
        kinds = {known.trace.kind for known in self._playbook.known}
        known = self._playbook.add(trace)
        if known.plan is None and trace.kind in kinds:
            # steps of one kind that differ share their homes, so a new one needs no search for these
            with suppress(DoesNotFitError):
                made = self._plan([trace], self._agreed)
                known.go_by(made.steps[0], self._forecast(trace, made.steps[0], made.on_device))
                self._choose_patience()
                return
        self.replan()
        if self._cold and trace.updates:
            self._cold = False
            self._schedule.record_again()

    def replan(self) -> None:
        """Plans for all known steps, and moves homes; all ranks call, between two steps.

        Raises:
            OutOfBudgetError: a known step takes more than there is.
        """
        known = self._playbook.known
        if not known:
            self._set_limit()
            return
        traces = [one.trace for one in known]
        free = self._policy.homes == "auto" and (not self._trains or any(trace.updates for trace in traces))
        try:
            made = self._plan(traces, "auto" if free else self._agreed)
        except DoesNotFitError as error:
            if free or self._policy.homes == "fixed":
                raise activations_do_not_fit(error, traces, self._store, self._footprints.aside) from error
            made = self._plan(traces, "auto")
        for one, step in zip(known, made.steps, strict=True):
            one.go_by(step, self._forecast(one.trace, step, made.on_device))
        self._choose_patience()
        self._move(made.on_device)
        self._set_limit()
        self._schedule.journal.ask()

    def make_room_for(self, gradients: Sequence[ChunkGradient]) -> None:
        """An update of ``gradients`` follows, the same on all ranks: what was frozen so far takes more from now on.

        Raises:
            OutOfBudgetError: with that a known step takes more than there is.
        """
        unfrozen = {gradient.chunk.index for gradient in gradients if any(gradient.used)}
        unfrozen -= {chunk.index for chunk in self._store.chunks if self._footprints.trained(chunk.spec)}
        if unfrozen:
            self._footprints = replace(self._footprints, unfrozen=self._footprints.unfrozen | unfrozen)
            self.replan()

    def rebudget(self, capacity: int | None) -> None:
        """Plans anew for a device of another size, the smallest that any rank gives; all call.

        Raises:
            OutOfBudgetError: a known step, or what stays on the device between two, takes more than that; the old size
                stays, on all ranks.
        """
        device = self._store.device
        every = self._store.collectives.gather_objects(capacity)
        capacity = min((nbytes for nbytes in every if nbytes is not None), default=None)
        before, device.capacity = device.capacity, capacity
        try:
            self.replan()
            self._require_room_for_homes()
        except OutOfBudgetError:
            device.capacity = before
            with suppress(OutOfBudgetError):  # it may have been too small for a known step before
                self.replan()
            raise

    def _require_room_for_homes(self) -> None:
        """Raises OutOfBudgetError if more stays on the device between two steps than it has; on all ranks."""
        self._schedule.free_idle()
        self._gradients.reclaim()
        every = self._store.collectives.gather_objects(max(self._store.device.used, self._home_bytes()))
        capacity = self._store.device.capacity
        if capacity is not None and max(every) > capacity:
            raise device_cannot_shrink(max(every), capacity)

    def complaints(self) -> tuple[bool, bool]:
        """Whether steps have grown on this rank, and whether memory has run out, so that plans have to be others."""
        return self._schedule.grown, bool(self._store.device.shortages)

    def heed(self, grown: bool, short: bool) -> None:
        """Does something about the complaints of any rank; all ranks call."""
        if grown:
            self._schedule.record_again()
        if short:
            self._plan_for_less()

    def _plan_for_less(self) -> None:
        """Lowers the budget by what was lacking, at least by a twentieth, and plans anew if that is possible."""
        device, shortages = self._store.device, self._store.device.shortages
        lacking = max((shortage.nbytes for shortage in shortages), default=0)
        every = self._store.collectives.gather_objects((lacking, tuple(shortages)))
        before = device.capacity
        if before is not None and self._schedule.moving:
            with suppress(OutOfBudgetError):  # it has been enough for this step: there is nothing to be gained
                self.rebudget(before - max(before // _LEAST_CUT, *(nbytes for nbytes, _ in every)))
        shortages.clear()
        told = device.capacity != before or not self._told_of_shortage
        self._told_of_shortage = True
        if told and self._store.collectives.rank == 0:
            warn_of_shortage(next(found for _, found in every if found), device)

    def _plan(self, traces: Sequence[Trace], homes: Literal["auto"] | Sequence[bool]) -> Plan:
        sizes = self._sizes()
        window = None
        if self._policy.narrow:
            window = _WINDOW_CHUNKS * max(size.full for size in sizes)
        device, host = self._store.device.capacity, self._store.host.capacity
        if host is not None:
            host -= self._footprints.aside
        speeds = self._speeds if self._by_time else None
        return plan(
            traces, sizes, device, host, homes=homes, window=window, depth=self._policy.depth, speeds=speeds,
            overlap=self._overlap,
        )  # fmt: skip

    def _exchange(self, trace: Trace) -> list[Trace]:
        """The step as each rank has seen it; measures speeds if they are not known."""
        if self._speeds is not None:
            return self._store.collectives.gather_objects(trace)
        every, self._speeds = exchange(self._store, self._footprints, self._policy.homes == "auto", trace)
        return every

    def _forecast(self, trace: Trace, step: StepPlan, on_device: Sequence[bool]) -> Forecast | None:
        if self._speeds is None:
            return None
        return forecast(trace, step, on_device, self._sizes(), self._speeds, self._overlap)

    def _choose_patience(self) -> None:
        """Gathers are put off only where updates take long, by numbers that the ranks have agreed on.

        Updates within a backward count as none: those under way at its end are of the chunks that come first.
        """
        forecasts = [known.forecast for known in self._playbook.known]
        self._store.arrivals.patient = any(
            one is None or one.host_update > _SHORT_UPDATE * one.compute for one in forecasts
        )

    def _sizes(self) -> list[ChunkBytes]:
        footprints = self._footprints
        return footprints.moved(footprints.all(self._accumulating, self._store.extra_bytes), self._near() is Home.FULL)

    def _near(self) -> Home:
        """What a home on the device is: on one rank it need not be freed, unless somebody wants that."""
        apart = any(chunk.home is Home.DEVICE for chunk in self._store.chunks)
        return Home.DEVICE if apart or self._store.layout.world_size > 1 else Home.FULL

    def _move(self, on_device: Sequence[bool]) -> None:
        self._schedule.free_idle()
        self._agreed = list(on_device)
        near = self._near()
        if self._policy.homes == "auto":
            pairs = list(zip(self._store.chunks, on_device, strict=True))
            arriving = [chunk for chunk, stays in pairs if stays]
            for chunk in (chunk for chunk, stays in pairs if not stays):
                while not self._leaves(chunk):
                    if not any(self._arrives(other, near) for other in arriving if other.home is Home.HOST):
                        self._rehome(chunk, Home.HOST)  # says what is lacking
            self._gradients.reclaim()
            for chunk in arriving:
                self._arrives(chunk, near)
            self._store.slabs.trim()
            self._give_back_waste()

    def _leaves(self, chunk: Chunk) -> bool:
        """Moves a home to host memory, if that has room while others have not left it yet; whether it is there."""
        with suppress(OutOfBudgetError):
            self._rehome(chunk, Home.HOST)
        return chunk.home is Home.HOST

    def _arrives(self, chunk: Chunk, home: Home) -> bool:
        """Moves a home to the device, where what is in use now may be in the way; whether it is there."""
        with suppress(OutOfBudgetError):
            self._rehome(chunk, home)
        return chunk.home is not Home.HOST

    def _give_back_waste(self) -> None:
        """Slabs lose their unused slots where what lives on the host will need them otherwise."""
        host = self._store.host.capacity
        sizes = zip(self._sizes(), self._agreed, strict=True)
        needed = sum(size.hosted for size, near in sizes if not near) + self._footprints.aside
        if host is not None and needed + self._store.slabs.free_bytes > host:
            self._store.compact()

    def _rehome(self, chunk: Chunk, home: Home) -> None:
        kept = chunk.home is Home.FULL
        self._store.rehome(chunk, home)
        if kept and chunk.home is not Home.FULL and not chunk.pins:
            self._store.reshard(chunk)

    def give_up_home(self, in_use: Collection[int]) -> bool:
        """Decides that a chunk that is not ``in_use`` has its home in host memory; whether there was one.

        That is the same chunk on all ranks. One whose gradient a reduction is at work on moves when there is need.
        """
        if self._policy.homes == "fixed":
            return False
        if self._store.layout.world_size == 1:
            return self.move_home(in_use)
        for index in reversed(range(len(self._agreed))):
            if self._agreed[index] and index not in in_use:
                self._agreed[index] = False
                if self._movable(self._store.chunks[index], in_use):
                    self._to_host(self._store.chunks[index])
                self._set_limit()
                return True
        return False

    def move_home(self, in_use: Collection[int]) -> bool:
        """Moves one home of this rank to host memory; whether there was one that can move now."""
        if self._policy.homes == "fixed":
            return False
        for chunk in sorted(self._store.chunks, key=lambda c: (self._agreed[c.index], -c.index)):
            if self._movable(chunk, in_use):
                self._to_host(chunk)
                if self._store.layout.world_size == 1:
                    self._agreed[chunk.index] = False
                    self._set_limit()
                    if self._schedule.course is Course.FOLLOWING:
                        self._schedule.record_again()  # the plan was wrong
                return True
        return False

    def reclaim(self) -> None:
        """Gives back the memory of gradient buffers that nobody uses."""
        self._gradients.reclaim()

    def _movable(self, chunk: Chunk, in_use: Collection[int]) -> bool:
        gradient = self._gradients.chunks.get(chunk.index)
        # where reductions take place, only theirs depend on where the result goes
        still = (GradientState.EMPTY, GradientState.FILLING, GradientState.READY)
        busy = gradient is not None and (
            gradient.state not in (still if self._store.layout.world_size > 1 else still[:1])
            # it is being updated, within the backward
            or (self._gradients.consume is not None and gradient.shard is not None)
        )
        return chunk.home is not Home.HOST and chunk.index not in in_use and not busy

    def _to_host(self, chunk: Chunk) -> None:
        self._rehome(chunk, Home.HOST)
        self._gradients.reclaim()

    def _set_limit(self) -> None:
        capacity = self._store.device.capacity
        work = self._home_bytes() + self._footprints.gradient_work()
        self._schedule.limit = None if capacity is None else capacity - work

    def _home_bytes(self) -> int:
        """Of the homes on the device that the ranks have agreed on."""
        return sum(size.kept for size, near in zip(self._sizes(), self._agreed, strict=True) if near)

    def _refusal(self, nbytes: int, what: str) -> str:
        return device_is_full(self._store, self._policy.homes == "auto", nbytes, what)

    def _with_reserve(self, trace: Trace) -> Trace:
        """``trace`` with room for the buffers of reductions: how many are under way at a time is not the same twice."""
        capacity = self._store.device.capacity
        if capacity is None or self._store.layout.world_size == 1:
            return trace
        reserve, chunks = self._footprints.gradient_work(), self._store.chunks

        def widened(moment: Moment) -> Moment:
            pinned = sum(chunks[index].spec.nbytes for index in moment.pinned)
            return replace(moment, other=max(moment.other, min(reserve, capacity - pinned)))

        return replace(trace, moments=tuple(widened(m) if m.backward else m for m in trace.moments))
