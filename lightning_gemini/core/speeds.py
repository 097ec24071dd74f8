"""How fast one rank copies, gathers and updates: a pure value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Speeds:
    """What one rank can do in a second, each thing on its own; infinity where it costs nothing.

    Attributes:
        fetch: bytes copied from host memory to the device.
        offload: bytes copied from the device to host memory.
        gather: bytes that arrive from other ranks in a gather; ``None`` on one rank, which gathers nothing.
        host_update: elements updated in host memory.
        device_update: elements updated on the device.

    Raises:
        ValueError: one of them is below 1.
    """

    fetch: float
    offload: float
    gather: float | None
    host_update: float
    device_update: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value >= 1:
                raise ValueError(f"the speed {field.name} must be at least 1 per second, got {value}.")


def slowest(every: Iterable[Speeds]) -> Speeds:
    """Of several ranks', each speed that the slowest of them has; ranks wait for each other.

    Raises:
        ValueError: there are none.
    """
    found = list(every)
    if not found:
        raise ValueError("expected the speeds of one or more ranks, got none.")
    gathers = [one.gather for one in found if one.gather is not None]
    return Speeds(
        fetch=min(one.fetch for one in found),
        offload=min(one.offload for one in found),
        gather=min(gathers, default=None),
        host_update=min(one.host_update for one in found),
        device_update=min(one.device_update for one in found),
    )
