"""Ends a step that has failed on this rank so that the other ranks need not wait, and all can go on.

NOTE: draining.
The others compute on and know nothing yet. In a step that goes by a plan it is known which chunks they will gather, in
which order, and the order of reductions is agreed anyway; so the rank that has failed takes part in what is left of
both, without computing and with zeros for gradients, and in the vote that follows it says what has happened. Where no
plan tells (a step that is being recorded, an evaluation), the others can only be ended (see ``peers``).
"""

from __future__ import annotations

import traceback
from typing import Protocol

import torch

from lightning_gemini.core.ballot import Ballot
from lightning_gemini.core.course import Course
from lightning_gemini.core.errors import (
    DisagreementError,
    OutOfBudgetError,
    PeerError,
    StepFailedError,
    UpdateError,
    end_together,
    ended_together,
)
from lightning_gemini.core.failure import Failure, Failures, lacks_memory
from lightning_gemini.core.gradients import Gradients
from lightning_gemini.core.refusal import memory_ran_out
from lightning_gemini.core.schedule import Schedule
from lightning_gemini.core.store import Store

_UNCHANGED = "weights and optimizer states are as they were, its gradients are dropped, and training can go on."


class Running(Protocol):
    """The step under way, as far as it matters here."""

    @property
    def kind(self) -> str:
        """What kind of step it is."""

    @property
    def begun(self) -> bool:
        """Whether a step has begun, by name or in a backward, and no update has come since."""

    def let_go(self) -> None:
        """Drops what is held of modules and of autograd's graph, but not the name of the step."""

    def end(self, updates: bool) -> None:
        """The step is over; ``updates`` tells whether an update follows."""


class Optimizers(Protocol):
    """The optimizers, as far as they matter here."""

    @property
    def early(self) -> bool:
        """Whether any of them has updated chunks within the backward under way."""


class Owner(Protocol):
    """What drops things: the engine."""

    @property
    def optimizers(self) -> Optimizers:
        """All of them."""

    def abort(self) -> None:
        """Drops the forward and the backward under way."""

    def leave(self, error: BaseException) -> None:
        """This rank cannot go on because of ``error``."""


class Drain:
    """Knows what the other ranks will do until their next vote, if anybody does.

    Args:
        store: the chunks.
        schedule: what they go by.
        gradients: theirs.
        ballot, failures: how ranks agree.
        owner: of all these.
    """

    def __init__(
        self,
        store: Store,
        schedule: Schedule,
        gradients: Gradients,
        ballot: Ballot,
        failures: Failures,
        owner: Owner,
    ) -> None:
        self._store = store
        self._schedule = schedule
        self._gradients = gradients
        self._ballot = ballot
        self._failures = failures
        self._owner = owner
        self._backwards = 0  # in the step under way
        self._trained: set[str] = set()  # kinds of steps that have had a backward
        self._several: set[str] = set()  # kinds of steps that have had more than one

    def backward_over(self, kind: str) -> None:
        """The gradients of a backward in a step of ``kind`` have been reduced."""
        self._backwards += 1
        self._trained.add(kind)
        if self._backwards > 1:
            self._several.add(kind)
        if self._gradients.accumulating:
            self._failures.exchange(failed=False)

    def step_over(self) -> None:
        """The next backward belongs to another step."""
        self._backwards = 0

    def end(self, error: BaseException, step: Running) -> BaseException:
        """Ends the step that ``error`` has ended on this rank; returns what is to be raised."""
        if isinstance(error, UpdateError):
            self._owner.leave(error)  # this rank has nothing to gather from any more
        together = isinstance(error, (PeerError, DisagreementError, UpdateError)) or ended_together(error)
        if together or not isinstance(error, Exception):
            self._owner.abort()
            return error
        alone = self._store.layout.world_size == 1
        drains = not alone and self._foresees(step)
        torn = self._tear() if self._owner.optimizers.early else ""
        failure = error
        if lacks_memory(error) or (drains and isinstance(error, OutOfBudgetError)):
            failure = self._in_words(error, step.kind, torn, alone or drains)
            _clear_frames(error)
        elif torn:
            error.add_note(torn)
        if drains:
            try:
                self._run(step, Failure(failure))
            except Exception as raised:
                if ended_together(raised):
                    return raised
                if failure is not error:
                    failure = OutOfBudgetError(
                        f"{failure}\n\nBut the other ranks could not be told ({raised}): they end."
                    )
                    failure.__cause__ = error
        self._owner.abort()
        if isinstance(failure, StepFailedError):  # on one rank
            self._gradients.discard()
            self._schedule.record_again()
            end_together(failure)
        return failure

    def abort(self) -> None:
        """Drops the forward and the backward under way."""
        self._owner.abort()

    def _tear(self) -> str:
        self._failures.torn = True
        return (
            "With update='in_backward' some weights had been updated when it failed, and others not: training cannot "
            "go on from them. Go on from a checkpoint."
        )

    def _foresees(self, step: Running) -> bool:
        """Whether it is known what the other ranks do until their next vote, or the end of their backward."""
        if self._gradients.consume is not None or step.kind in self._several or not step.begun:
            return False
        if self._gradients.accumulating and self._backwards:
            return False  # the others have been told that all was well
        if not self._schedule.moving:
            return torch.is_grad_enabled() and step.kind in self._trained
        trace = self._schedule.foresee()
        return trace is not None and trace.has_backward and trace.updates != self._gradients.accumulating

    def _run(self, step: Running, failure: Failure) -> None:
        accumulating, reduces = self._gradients.accumulating, not self._backwards
        step.let_go()
        reductions = self._gradients.reduce_nothing() if reduces else None
        if reduces and accumulating:
            self._failures.exchange(failed=True)
        if self._schedule.moving:
            self._schedule.drain()
        if reductions is not None:
            reductions.wait()
        step.end(updates=not accumulating)
        if accumulating:
            self._failures.end(failure)
        self._ballot.fail(failure)

    def _in_words(self, error: Exception, kind: str, torn: str, stays: bool) -> OutOfBudgetError:
        """The error to raise for one that says that memory ran out; ``stays`` if training can go on."""
        under_way = self._schedule.course is not Course.NONE
        where = f"{self._store.collectives.pulse.unit} ({kind})" if under_way else f"the {kind}"
        probe, several = self._schedule.probe.peak(), self._store.layout.world_size > 1
        if torn or not stays:
            outcome = torn or (
                "The ranks end, because it is not known what the others will do: the step does not go by a plan. The "
                "weights are unchanged; go on from a checkpoint."
            )
            found = OutOfBudgetError(memory_ran_out(error, self._store, where, outcome, probe))
        else:
            outcome = f"{'No rank takes the step' if several else 'The step is not taken'}: {_UNCHANGED}"
            found = StepFailedError(memory_ran_out(error, self._store, where, outcome, probe))
        found.__cause__ = error
        return found


def _clear_frames(error: BaseException | None) -> None:
    """Drops the variables of the calls that have failed: they hold activations."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
