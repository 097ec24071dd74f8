"""Runs many small scenarios in one process group: a failure of one is that one's alone."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch.distributed as dist

from tests.ranks import run_ranks

Scenario = Callable[[], Any]


def group() -> dist.ProcessGroup | None:
    """For ``shard``: all ranks, or nobody else."""
    return dist.group.WORLD if dist.is_initialized() else None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _run(scenarios: Sequence[Scenario]) -> list[str | None]:
    said: list[str | None] = []
    for scenario in scenarios:
        try:
            scenario()
        except Exception:
            said.append(traceback.format_exc())
        else:
            said.append(None)
    return said


@cache
def _on_ranks(scenarios: tuple[Scenario, ...], world_size: int) -> list[list[str | None]]:
    return run_ranks(_run, world_size, scenarios)


def check(scenario: Scenario, scenarios: Sequence[Scenario], world_size: int) -> None:
    """Runs ``scenario``: here on one rank, on several together with the other ``scenarios``, once for all of them.

    A scenario is a function of a module, and fails by an exception; on several ranks best on all of them.
    """
    if world_size == 1:
        scenario()
        return
    found = [said[scenarios.index(scenario)] for said in _on_ranks(tuple(scenarios), world_size)]
    assert not any(found), "\n".join(f"rank {number}: {text}" for number, text in enumerate(found) if text)
