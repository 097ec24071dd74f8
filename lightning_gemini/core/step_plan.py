"""What a plan is made of and what it says: pure values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChunkBytes:
    """One chunk on one rank, in bytes.

    Attributes:
        full: unsharded, on the device.
        kept: on the device all the time if its home is there: shard, master, optimizer states, gradient shard.
        hosted: in host memory all the time if its home is there: the same.
        fetch: host to device for one unshard, if its home is in host memory.
        gather: from other ranks for one unshard, wherever its home is.
        offload: device to host for one backward, if its home is in host memory: its reduced gradient; 0 if frozen.
        trained: whether an update changes it.
        whole: whether a home on the device is the unsharded chunk itself (one rank): then ``kept`` contains ``full``,
            and the chunk is never freed, fetched or gathered.
        elements: how many an update after the step changes; 0 if frozen.
    """

    full: int
    kept: int
    hosted: int
    fetch: int
    gather: int
    offload: int
    trained: bool
    whole: bool
    elements: int = 0


@dataclass(frozen=True)
class StepPlan:
    """What to do in the steps of one trace, again and again.

    Attributes:
        start: chunks to be unsharded when the step begins, by need; what else is unsharded and idle then is freed.
        evict: by moment: chunks that are freed before the moment's chunk is unsharded.
        prefetch: by moment: chunks whose unshard begins as soon as the moment's own chunk is usable, in order.
        fetched, gathered, offloaded: bytes per step.
        least: a lower bound of ``fetched + gathered`` with these homes and limits.
        peak: by moment: bytes of unsharded chunks (in use, kept or under way) and of homes on the device.
    """

    start: tuple[int, ...]
    evict: tuple[tuple[int, ...], ...]
    prefetch: tuple[tuple[int, ...], ...]
    fetched: int
    gathered: int
    offloaded: int
    least: int
    peak: tuple[int, ...]

    @property
    def moved(self) -> int:
        """Bytes per step, all together."""
        return self.fetched + self.gathered + self.offloaded


@dataclass(frozen=True)
class Plan:
    """By chunk, whether its home is the device; by trace, what to do in such a step."""

    on_device: tuple[bool, ...]
    steps: tuple[StepPlan, ...]
