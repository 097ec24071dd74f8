"""A step that fails on one rank: what that rank says, and how all of them end the step together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from lightning_gemini.core.collectives import Collectives, Pending
from lightning_gemini.core.errors import (
    OutOfBudgetError,
    PeerError,
    StateError,
    StepFailedError,
    UpdateError,
    end_together,
)
from lightning_gemini.core.memory import out_of_memory


@dataclass(frozen=True)
class Failure:
    """Why a step has failed on this rank; ``error`` is what is raised here."""

    error: Exception

    @property
    def word(self) -> tuple[bool, str]:
        """For the other ranks: whether memory has run out, and what happened."""
        memory = isinstance(self.error, StepFailedError)
        return memory, str(self.error) if memory else in_a_word(self.error)


class Failures:
    """Ends a step on all ranks that has failed on some of them.

    Args:
        collectives: of the ranks.
        device: where they exchange what they have to say.
        abort: drops the forward and the backward under way.
        discard: drops all gradients.

    Attributes:
        torn: whether a failure has left weights that are those of no step.
    """

    def __init__(
        self,
        collectives: Collectives,
        device: torch.device,
        abort: Callable[[], None],
        discard: Callable[[], None],
    ) -> None:
        self._collectives = collectives
        self._device = device
        self._abort, self._discard = abort, discard
        self.torn = False
        self._pending: list[tuple[Tensor, Pending]] = []

    def exchange(self, failed: bool) -> None:
        """Tells the other ranks whether this one has failed, after a backward that no vote follows; does not wait.

        All ranks call, after the reductions of the backward; :meth:`check` finds out what they have said.
        """
        if self._collectives.world_size > 1:
            flag = torch.full((1,), float(failed), device=self._device)
            self._pending.append((flag, self._collectives.sum_reduced(flag)))

    def check(self) -> None:
        """Called before all ranks do anything else together.

        Raises:
            StepFailedError, PeerError: a backward that no vote followed has failed on another rank.
            StateError: the weights are torn.
        """
        self.require_whole()
        if self._heard():
            self.end(None)

    @contextmanager
    def ends_all(self) -> Iterator[None]:
        """Around what may find out that an update has failed: then the other ranks end, too."""
        try:
            yield
        except UpdateError as error:
            self._collectives.leave(in_a_word(error))
            raise

    def require_whole(self) -> None:
        """Raises StateError if the weights are torn."""
        if self.torn:
            raise StateError("a failure has left weights that are those of no step. Go on from a checkpoint.")

    def end(self, own: Failure | None) -> NoReturn:
        """Ends the step, which has failed on some rank; all ranks call.

        Args:
            own: what has happened on this rank, if it is one that has failed.

        Raises:
            StepFailedError: memory has run out, on this rank or another one.
            PeerError: something else has happened on other ranks, with their words.
            Exception: ``own`` error.
        """
        self._heard()
        words = self._collectives.gather_objects(None if own is None else own.word)
        self._abort()
        self._discard()
        if own is not None:
            raise end_together(own.error)
        said = {rank: word for rank, word in enumerate(words) if word is not None}
        if all(memory for memory, _ in said.values()):
            raise end_together(StepFailedError(next(iter(said.values()))[1]))
        raise end_together(PeerError("; ".join(f"rank {rank} failed: {text}" for rank, (_, text) in said.items())))

    def _heard(self) -> bool:
        """Waits for what is under way; whether some rank has said that it has failed."""
        pending, self._pending = self._pending, []
        for _, under_way in pending:
            under_way.wait()
        return any(bool(flag.item()) for flag, _ in pending)


def in_a_word(error: BaseException) -> str:
    """``error`` for other ranks: its type and what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def lacks_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the system, and not a budget, has no memory left."""
    if isinstance(error, OutOfBudgetError):
        return error.__cause__ is not None and out_of_memory(error.__cause__)
    return out_of_memory(error)
