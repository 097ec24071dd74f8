"""Runs a function on several ranks: processes forked from a server that has done the slow imports once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import ranks
from benchmarks.ranks import RankError

__all__ = ["RankError", "run_ranks"]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Calls ``function(*args)`` on each rank inside an initialised gloo group and returns the results by rank.

    ``function`` must be importable and ``args`` and results must pickle. If a rank raises, dies or is not done in
    time, all are killed and :class:`RankError` carries every traceback.
    """
    return ranks.run_ranks(function, world_size, 1, *args, timeout=timeout, preload="tests.preload")
