"""The time between two steps, when parameters may be ordinary tensors for a while, and weights may be replaced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from lightning_gemini.core.ballot import Ballot
from lightning_gemini.core.chunk_gradient import ChunkGradient
from lightning_gemini.core.construct import WeightSource
from lightning_gemini.core.errors import StateError
from lightning_gemini.core.guard import Guard
from lightning_gemini.core.phase import Phase
from lightning_gemini.core.schedule import Schedule
from lightning_gemini.core.step import Step
from lightning_gemini.core.store import Store
from lightning_gemini.core.summon import Summoner


class Rest:
    """What has to be so before, and is put back after it.

    Args:
        require_live: raises if the engine cannot do the action that it is given.
        require_whole: raises if the weights are those of no step.
        enter: makes the engine go into a phase.
    """

    def __init__(
        self,
        store: Store,
        schedule: Schedule,
        step: Step,
        guard: Guard,
        summoner: Summoner,
        ballot: Ballot,
        require_live: Callable[[str], None],
        require_whole: Callable[[], None],
        enter: Callable[[Phase], None],
    ) -> None:
        self._store = store
        self._schedule = schedule
        self._step = step
        self._guard = guard
        self._summoner = summoner
        self._ballot = ballot
        self._require_live = require_live
        self._require_whole = require_whole
        self._enter = enter

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around what looks at the state and changes nothing; each rank for itself, also after the ranks have parted.

        Raises:
            StateError: a step is under way, a parameter was written to unnoticed, or the weights are those of no step.
        """
        if self._store.collectives.parted:
            self._require_whole()
        else:
            self._require("save a checkpoint")
        self._enter(Phase.SAVING)
        try:
            yield
        finally:
            self._enter(Phase.LIVE)

    @contextmanager
    def begin(self, action: str) -> Iterator[None]:
        """Around what changes parameters: nothing is unsharded but what always is. All ranks enter together.

        Raises:
            StateError: as :meth:`saving`.
        """
        self._require(action)
        self._schedule.reset()
        self._enter(Phase.SUMMONED)
        try:
            yield
        finally:
            for chunk in self._store.chunks:
                chunk.rebind()
            self._step.stand_ins.place()
            self._guard.note()
            self._enter(Phase.LIVE)

    @contextmanager
    def loading(
        self, index_of: Mapping[nn.Parameter, int], tear: Callable[[], None]
    ) -> Iterator[Callable[[WeightSource], None]]:
        """See :meth:`Engine.loading`; ``tear`` is told if weights are those of no step any more."""

        def fill(source: WeightSource) -> None:
            try:
                source.fill(self._store, index_of)
            except BaseException:
                tear()
                raise

        with self.begin("load weights"):
            yield fill

    @contextmanager
    def summoned(
        self, wanted: Collection[int], gradients: Sequence[ChunkGradient], rank0_only: bool, exact: bool
    ) -> Iterator[None]:
        """Inside :meth:`begin`: gives the ``wanted`` parameters their whole values, and ``gradients`` theirs."""
        where = self._store.host.device if rank0_only else self._store.device.device
        self._summoner.bind(wanted, where, not rank0_only, exact)
        self._step.stand_ins.forget()
        try:
            if gradients:
                self._ballot.agree(gradients)
                self._summoner.bind_grads(wanted, gradients, where, everywhere=not rank0_only)
            yield
        finally:
            for chunk in self._store.chunks if gradients else ():
                for param in chunk.params:
                    param.grad = None

    def _require(self, action: str) -> None:
        self._require_live(action)
        if self._step.running:
            raise StateError(f"cannot {action} inside a forward or a backward; do it before or after")
        self._guard.check()
