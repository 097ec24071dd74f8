"""Which chunks are unsharded: records a step, follows its plan, or falls back to least-recently-used.

NOTE: what all ranks agree on.
Chunks are gathered in one order on all ranks only if all ranks free and prefetch the same ones. So what is decided
here follows from the order of units, from plans and from budgets that the ranks have agreed on, and never from what
this rank's memory holds at the moment; on one rank there is nobody to agree with, and everything idle gives way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import Protocol

from lightning_gemini.core.chunk import Chunk, ChunkState, Home
from lightning_gemini.core.course import COURSES, Course
from lightning_gemini.core.errors import OutOfBudgetError, StateError
from lightning_gemini.core.footprint import trained
from lightning_gemini.core.journal import Journal
from lightning_gemini.core.memory import MemoryProbe
from lightning_gemini.core.playbook import Known, Playbook
from lightning_gemini.core.recorder import Recorder
from lightning_gemini.core.residents import Residents
from lightning_gemini.core.store import Store
from lightning_gemini.core.trace import Moment, Trace

#: Idle chunks that stay unsharded without a plan. One is often needed again at once (a parent's weight, the last unit
#: of the forward), the second bridges a parameter between two uses; more would be a guess.
IDLE_CHUNKS = 2


class Relief(Protocol):
    """Somebody who can make room on the device beside what a schedule frees."""

    def give_up_home(self, in_use: Collection[int]) -> bool:
        """Gives up a chunk's home on the device, none ``in_use`` and the same on all ranks; whether there was one."""

    def move_home(self, in_use: Collection[int]) -> bool:
        """The same on this rank alone: what is gathered when does not depend on where a shard is."""

    def reclaim(self) -> None:
        """Gives back the memory of gradient buffers that nobody uses."""


class Schedule:
    """Unshards chunks as units need them or earlier, and frees those that are idle.

    Args:
        store: the chunks.
        kind: says what kind of step is beginning.

    Attributes:
        playbook: the steps that are known.
        residents: the chunks that are unsharded.
        probe: measures what is on the device beside chunks.
        journal: writes steps down for people.
        moving: whether chunks may be freed at all; if not, parameters are always resident.
        limit: bytes of unsharded chunks that may be freed, as all ranks have agreed; ``None`` for no bound.
        grown: whether a step has taken more memory than plans may use, so that it is to be recorded again.
        relief: makes room where freeing is not enough; to be set before the first step.
    """

    def __init__(self, store: Store, kind: Callable[[], str]) -> None:
        self._store = store
        self.playbook = Playbook()
        self._kind = kind
        self.probe = MemoryProbe(store.device.device)
        self._course = Course.NONE
        self._step_kind = ""
        self._begun: list[int] = []  # the chunks that moments of the step under way have begun with
        self._known: Known | None = None  # the step that is followed
        self._recorder: Recorder | None = None
        self.residents = Residents(store)
        self._expired: set[int] = set()  # updated in the backward under way
        self.journal = Journal(store)
        self.limit: int | None = None
        self.grown = False
        self.relief: Relief
        self._pulse = store.collectives.pulse
        self._pulse.sections["Step"] = self._describe
        store.device.spare = self._spare if store.layout.world_size == 1 else self._spare_homes
        store.device.relieve = self._relieve
        self.moving = any(chunk.home is not Home.FULL for chunk in store.chunks)

    @property
    def course(self) -> Course:
        """What the step under way goes by."""
        return self._course

    def acquire(self, chunk: Chunk, reason: str) -> None:
        """Makes ``chunk`` resident for ``reason`` (a unit's name) and pins it until :meth:`release`.

        Raises:
            StateError: it holds other values than when the backward under way began.
        """
        self._pulse.beats += 1
        self._pulse.unit = reason
        if chunk.index in self._expired:
            raise StateError(
                f"{reason} needs {chunk.names[0]} in a backward that has updated it already, because all of its "
                "gradients seemed to be in (is it used detached, or by several reentrant checkpoints?). Use "
                "update='at_step' instead of 'in_backward'."
            )
        if chunk.pins:
            chunk.pin()
            return
        if self._recorder is not None:
            self._recorder.pause()
        self._advance(chunk)
        held = self.residents
        held.idle.pop(chunk.index, None)
        if not chunk.resident:
            with self._store.waits.measure():
                self._bring(chunk, reason)
        chunk.pin()
        held.in_use[chunk.index] = chunk
        if self._recorder is not None:
            self._recorder.begin(chunk, reason, held.in_use.values())
        self._prefetch()
        if self.journal.writing:
            self.journal.moment(chunk, reason, held.in_use, held.idle, held.coming)

    def release(self, chunk: Chunk) -> None:
        """Ends one use; a chunk nobody uses any more becomes idle."""
        chunk.unpin()
        if chunk.pins:
            return
        self.residents.rest(chunk)
        if chunk.index in self._expired:
            self.residents.drop(chunk)
        if self._course is not Course.FOLLOWING:
            self._keep_few_idle()

    def renew(self, chunk: Chunk, refill: bool = True) -> None:
        """The shard of ``chunk`` changes: brings the new values if it is kept or in use, frees it if it is idle.

        Args:
            refill: whether who uses it now is to see the new values; if not, the chunk expires: it is freed after its
                last use, and nobody may use it again until :meth:`backward_over`.
        """
        if chunk.home is Home.FULL:
            self._store.refresh(chunk).wait()
            return
        self._store.arrivals.updated(chunk)
        if not refill:
            self._expired.add(chunk.index)
        if chunk.index in self.residents.idle or chunk.index in self.residents.coming:
            self.residents.drop(chunk)
        elif chunk.resident and refill:
            self._store.refill(chunk, "its new values after a step")

    def need_of(self, chunk: Chunk) -> int:
        """When the next step needs ``chunk``, as a number to sort by; the layout's order where that is not known."""
        known = self.playbook.expect()
        if known is None or chunk.index not in known.trace.uses:
            return chunk.index + (len(known.trace.moments) if known is not None else 0)
        return known.trace.uses[chunk.index][0][0]

    def backward_over(self) -> None:
        """What has expired may be used again, with its new values."""
        self._expired.clear()

    def end(self, updates: bool) -> Trace | None:
        """The step under way is over; returns it if it was recorded.

        Args:
            updates: whether an update follows; then copies of what it changes go.
        """
        if self._course is Course.NONE:
            return None
        trace = self._recorder.end(updates) if self._recorder is not None else None
        if self._course is Course.FOLLOWING and self._known is not None:
            same = self.playbook.same(self._step_kind, self._begun, updates)
            if same is not None:  # the one that was expected, or one that differs in whether an update follows
                self.playbook.followed(same)
                self._store.counters.followed += 1
                self._look_for_growth()
                if self.journal.writing:
                    self.journal.end(same.trace.has_backward)
            else:  # it ended early, or for the first time without an update, or with one
                self._store.counters.strayed += 1
                trace = Trace(self._step_kind, self._known.trace.moments[: len(self._begun)], updates)
        self._stop()
        if updates:
            self.residents.drop_all_but([c.index for c in self._store.chunks if not trained(c.spec)])
        return trace

    def resume(self) -> None:
        """Between two steps: frees what the next one does not begin with, and begins to bring what it does."""
        known = self.playbook.expect()
        if self._course is not Course.NONE or known is None or known.plan is None:
            return
        self.residents.drop_all_but(known.plan.start)
        if self._store.layout.world_size == 1:
            for index in known.plan.start:
                self._begin_to_bring(self._store.chunks[index], "the next step")
            return
        self.residents.owe(known.plan.start)
        with suppress(OutOfBudgetError):  # no step is under way that could fail: the next one tries again
            self.residents.begin_owed()

    def record_again(self) -> None:
        """Has the next step of each kind recorded, because one has grown on some rank; all ranks call."""
        self.grown = False
        for known in self.playbook.known:
            self.playbook.lost(known.trace.kind)

    def free_idle(self) -> None:
        """Frees all chunks that nobody uses."""
        self.residents.drop_all_but(())

    def reset(self) -> None:
        """Frees whatever is unsharded, in use or not; after a failed step and before the end."""
        self._stop()
        self._expired.clear()
        self.residents.reset()

    def foresee(self) -> Trace | None:
        """The step under way, or the one that is beginning, as it is known; ``None`` if it goes by no plan."""
        known = self._known
        if self._course is Course.NONE:
            known = self.playbook.expect(self._kind())
        return known.trace if known is not None and known.plan is not None else None

    def drain(self) -> None:
        """Does with chunks what is left to be done by the plan of the step, for the other ranks, who compute.

        Nobody on this rank uses a chunk any more. The moment in which the step failed may have come to its end, or not:
        what it has not gathered yet is gathered now.

        Raises:
            OutOfBudgetError: there is no room for a chunk, now or ever; the ranks are not in step any more.
        """
        held = self.residents
        held.let_go()
        self.journal.cancel()
        trace = self.foresee()
        assert trace is not None
        order = trace.order
        if not self._begun:
            self._advance(self._store.chunks[order[0]])
        while True:
            chunk = self._store.chunks[order[len(self._begun) - 1]]
            held.idle.pop(chunk.index, None)
            if not chunk.resident:
                held.bring(chunk, "a step that has failed on this rank")
            held.rest(chunk)
            self._prefetch()
            if len(self._begun) == len(order):
                return
            self._advance(self._store.chunks[order[len(self._begun)]])

    def _describe(self) -> str:
        """The step under way, in words; waits for nothing."""
        of = f" of {len(self._known.trace.order)} by its plan" if self._known is not None else ""
        step = f"{self._step_kind!r}, {self._course.name.lower()}: moment {len(self._begun)}{of}, {self._pulse.unit}"
        return f"{step}; began with chunks {self._begun[-20:]}; coming: {sorted(self.residents.coming)}"

    # The moments of a step

    def _advance(self, chunk: Chunk) -> None:
        """A moment begins with ``chunk``: finds out what to go by, and frees what has to go."""
        self.residents.begin_owed()
        if self._course is Course.NONE:
            self._begin()
        if self._store.arrivals.waiting:
            with self._store.waits.measure():
                self._store.arrivals.proceed()
        self._begun.append(chunk.index)
        if self._course is not Course.FOLLOWING:
            return
        assert self._known is not None
        at, order = len(self._begun) - 1, self._known.trace.order
        if at >= len(order) or order[at] != chunk.index:
            other = self.playbook.with_order(self._step_kind, self._begun)
            if other is None or other.plan is None:
                self._lose_way(self._known.trace.moments[:at])
                return
            self._known = other
            self.residents.drop_all_but(other.resident(at))
        assert self._known.plan is not None
        for index in self._known.plan.evict[at]:
            self.residents.drop(self._store.chunks[index])

    def _begin(self) -> None:
        self._step_kind = self._kind()
        known = self.playbook.begin(self._step_kind)
        if known is not None and known.plan is not None:
            self._go(Course.FOLLOWING)
            self._known = known
            self.residents.drop_all_but(known.plan.start)
            self.journal.begin(known.trace.kind, known.trace.has_backward, known.predicted)
            self.probe.reset()
            return
        self.free_idle()
        if self.playbook.worth_recording(self._step_kind):
            self._go(Course.RECORDING)
            self._recorder = Recorder(self._step_kind, self._store.device, self.probe)
        else:
            self._go(Course.ASTRAY)

    def _lose_way(self, moments: Sequence[Moment]) -> None:
        """The step is none that is known, though it began with ``moments``: it is recorded from here on."""
        self._go(Course.ASTRAY)
        self._known = None
        self._store.counters.strayed += 1
        self.journal.cancel()
        if self.playbook.worth_recording(self._step_kind):
            self._recorder = Recorder(self._step_kind, self._store.device, self.probe, moments)
        for chunk in list(self.residents.coming.values()):
            self.residents.drop(chunk)
        self._keep_few_idle()

    def _keep_few_idle(self) -> None:
        while len(self.residents.idle) > IDLE_CHUNKS:
            self.residents.drop_oldest()

    def _look_for_growth(self) -> None:
        capacity = self._store.device.capacity
        self.grown |= capacity is not None and self.probe.peak() > capacity
        if self.grown and self._store.layout.world_size == 1:
            self.record_again()  # several ranks agree on it before an update

    def _stop(self) -> None:
        if self._course is not Course.NONE:
            self._go(Course.NONE)
        self._known, self._recorder = None, None
        self._begun.clear()
        self.journal.cancel()
        self.journal.mark()

    def _go(self, course: Course) -> None:
        if (self._course, course) not in COURSES:
            raise StateError(f"a step cannot go from {self._course.name} to {course.name}")
        self._course = course

    def _prefetch(self) -> None:
        if self._known is None or self._known.plan is None:
            return
        for index in self._known.plan.prefetch[len(self._begun) - 1]:
            self._begin_to_bring(self._store.chunks[index], "a unit to come")

    def _bring(self, chunk: Chunk, reason: str) -> None:
        if chunk.state is ChunkState.FREE:
            self._find_room(chunk.spec.nbytes)
        self.residents.bring(chunk, reason)

    # Room

    def _begin_to_bring(self, chunk: Chunk, reason: str) -> None:
        if self._store.layout.world_size > 1 or not self._lacks(chunk.spec.nbytes):
            self.residents.begin(chunk, reason)

    def _lacks(self, nbytes: int) -> bool:
        """Whether there is no room for so many bytes more of unsharded chunks."""
        if self._store.layout.world_size == 1:
            return not self._store.device.room(nbytes)
        if self._course is Course.FOLLOWING:
            return False  # plans fit
        return self.limit is not None and self._store.unsharded_bytes + nbytes > self.limit

    def _find_room(self, nbytes: int) -> None:
        if self._store.layout.world_size == 1 and self._lacks(nbytes):
            self.relief.reclaim()  # on several ranks the limit is one of unsharded chunks
        while self._lacks(nbytes):
            if self.residents.idle:
                self.residents.drop_oldest()
            elif self.residents.coming:
                self.residents.drop(next(iter(self.residents.coming.values())))
            elif not self.relief.give_up_home(self.residents.in_use):
                return  # the tier says what is wrong

    def _spare(self, nbytes: int) -> None:
        """On one rank: somebody else on the device needs room."""
        self.relief.reclaim()
        if self._course is not Course.NONE:
            self._find_room(nbytes)
        while self._lacks(nbytes) and self.residents.idle:
            self.residents.drop_oldest()

    def _spare_homes(self, nbytes: int) -> None:
        """On several ranks: how much gradients take at one time is a matter of timing, and no other rank's."""
        self.relief.reclaim()
        while self._course is not Course.NONE and not self._store.device.room(nbytes):
            if not self.relief.move_home(self.residents.in_use):
                return

    def _relieve(self) -> Iterator[str]:
        """The system has no memory left, whatever is counted: frees one thing after the other, and says what."""
        before = self._store.device.work
        self.relief.reclaim()
        yield "pooled gradient buffers" if self._store.device.work < before else ""
        alone = self._store.layout.world_size == 1
        while alone and (spared := self.residents.idle or self.residents.coming):
            index = next(iter(spared))
            self.residents.drop(self._store.chunks[index])
            yield f"chunk {index}"
        give_up = self.relief.give_up_home if alone else self.relief.move_home
        while self._course is not Course.NONE and give_up(self.residents.in_use):
            yield "a home on the device"
