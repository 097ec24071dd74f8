"""The largest model that trains: how deep a decoder of a given width may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.job import Job, Machine
from benchmarks.shapes import Shape

#: A trial's outcome: it trained, it did not, or nobody knows because there was no time.
Trial = Callable[[int], bool | None]

#: The share of the memory that the first guess fills, where the goal is out of reach.
_FULL = 0.92


@dataclass(frozen=True)
class Search:
    """What a search has found.

    Attributes:
        best: the greatest depth that trained, 0 if none did.
        failed: the least that did not, or that cannot by arithmetic.
        tried: depths and outcomes, in the order of the trials.
    """

    best: int
    failed: int
    tried: tuple[tuple[int, bool | None], ...]

    @property
    def finished(self) -> bool:
        """Whether one layer more is known to be too many."""
        return self.failed - self.best == 1


def largest_depth(trains: Trial, first: int, most: int, more: Callable[[], bool]) -> Search:
    """The greatest depth for which ``trains``, by galloping from a guess and then by bisection.

    Args:
        trains: whether a depth trains; if one does, every smaller one is taken to do so.
        first: the guess.
        most: a depth that nothing greater than can train.
        more: whether there is time for another trial.
    """
    best, failed, depth = 0, most + 1, min(max(first, 1), max(most, 1))
    stride = max(1, first // 16)
    tried: list[tuple[int, bool | None]] = []
    while failed - best > 1 and more():
        outcome = trains(depth)
        tried.append((depth, outcome))
        if outcome is None:
            break
        best, failed = (depth, failed) if outcome else (best, depth)
        middle = (best + failed) // 2
        if failed > most:  # no failure yet
            depth = min(best + stride, most)
        elif best == 0:
            depth = max(failed - stride, 1)
        else:
            depth = middle
        stride *= 2
    return Search(best, failed, tuple(tried))


@dataclass(frozen=True)
class Mode:
    """One way to need less memory.

    Attributes:
        nbytes: per parameter, in all.
        goal: parameters that should train on 80 GB beside 128 GB of host memory.
    """

    name: str
    nbytes: int
    goal: float
    update: Literal["at_step", "in_backward"] = "at_step"
    bf16_states: bool = False

    @property
    def clipping(self) -> bool:
        """Whether the norm of the gradients is clipped, for which they have to wait."""
        return self.update == "at_step"

    def job(self, shape: Shape) -> Job:
        """The contender that trains ``shape`` with one sequence at a time."""
        return Job(self.name, shape, 1, update=self.update, bf16_states=self.bf16_states, clipping=self.clipping)


MODES = (
    Mode("with clipping", 14, 14e9),
    Mode("in backward", 12, 16e9, update="in_backward"),
    Mode("bf16 states, with clipping", 10, 16e9, bf16_states=True),
)


def depths(mode: Mode, width_of: Shape, machine: Machine) -> tuple[int, int]:
    """By arithmetic alone: where to begin, and the depth that fills the memory of host and device.

    To begin with the goal, where there is memory for it, decides with one trial whether it is met.
    """
    pairs = ((machine.device_memory, machine.device_total), (machine.host_memory, machine.host_total))
    memory = sum(bound or total or 0 for bound, total in pairs)
    most = max(_deepest(memory / mode.nbytes, width_of), 1)
    goal = _deepest(mode.goal - 1, width_of) + 1
    return goal if goal <= most else max(_deepest(_FULL * memory / mode.nbytes, width_of), 1), most


def _deepest(parameters: float, width_of: Shape) -> int:
    without = replace(width_of, layers=0).parameters
    each = replace(width_of, layers=1).parameters - without
    return int((parameters - without) // each)
