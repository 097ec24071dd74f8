"""What a run of the benchmarks is asked to do."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from benchmarks.workload import Opt, Tower


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Settings:
    """Settings of one run.

    Attributes:
        pairs: samples of each contender, taken in pairs with the references'.
        ranks: the numbers of ranks that everything is measured at; the cores are shared evenly.
        opt: what ``step`` and ``memory`` train.
        tower: what ``hooks`` trains.
        seed: of the order in the rounds.
        brief: whether ``memory``, which starts processes for each contender, is content with a few of them.
    """

    pairs: int = 30
    ranks: tuple[int, ...] = (1, 2)
    opt: Opt = field(default_factory=Opt)
    tower: Tower = field(default_factory=Tower)
    seed: int = 0
    brief: bool = False

    def threads(self, ranks: int) -> int:
        """Threads that each of ``ranks`` ranks computes with."""
        return max(1, cores() // ranks)


def quick(pairs: int) -> Settings:
    """Seconds instead of minutes: that everything runs, not how fast."""
    opt = Opt(layers=1, width=64, vocabulary=256, length=16, rows=2)
    return Settings(pairs=pairs, opt=opt, tower=Tower(units=6, width=8), brief=True)
