"""One contender's line in the table: what it did in all rounds, and the figures that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.child import Outcome
from benchmarks.estimate import median, ratio
from benchmarks.floor import Floor, Rates, Work, floor_of
from benchmarks.job import Job
from benchmarks.result import Record


@dataclass
class Row:
    """A job and what became of it, by round.

    Attributes:
        rounds: the timed steps' seconds, by number of round; a round that failed is not there.
        result: what the last good round returned.
        problem: why there is no more, ``None`` if all went well.
        peaks: the most bytes seen, in failed rounds too: ``device_peak`` and ``host_peak``.
    """

    job: Job
    rounds: dict[int, list[float]] = field(default_factory=dict)
    clip_pairs: list[tuple[float, float]] = field(default_factory=list)
    result: Record | None = None
    problem: str | None = None
    details: str = ""
    peaks: dict[str, int] = field(default_factory=dict)

    def add(self, number: int, outcome: Outcome) -> None:
        """What became of round ``number``."""
        seen = {**outcome.said, **(outcome.value or {}), "host_peak": outcome.host_peak}
        for key, names in (("device_peak", ("device_peak", "device_peak_at_failure")), ("host_peak", ("host_peak",))):
            self.peaks[key] = max(self.peaks.get(key, 0), *(seen.get(name) or 0 for name in names))
        self.problem, self.details = outcome.error, outcome.details
        if outcome.value is not None:
            self.result = outcome.value
            self.rounds[number] = outcome.value["seconds"]
            self.clip_pairs += outcome.value["clip_pairs"]

    @property
    def seconds(self) -> float | None:
        """The median step."""
        return median([s for samples in self.rounds.values() for s in samples]) if self.rounds else None

    def floor(self, rates: Rates | None) -> Floor | None:
        """The least that a step of this plan can take; ``None`` where there is no plan or no rates."""
        if rates is None or self.result is None or self.result["plan"] is None:
            return None
        return floor_of(Work(flops=self.job.shape.least_flops(self.job.tokens), **self.result["plan"]), rates)

    def speed_to(self, other: Row | None) -> float | None:
        """How many times as fast as ``other``: the median over the rounds that both have."""
        if other is None:
            return None
        both = sorted(self.rounds.keys() & other.rounds.keys())
        if not both:
            return None
        return ratio([median(other.rounds[n]) for n in both], [median(self.rounds[n]) for n in both]).median

    @property
    def clip_cost(self) -> float | None:
        """How much longer a step takes with clipping, as a share."""
        if not self.clip_pairs:
            return None
        return ratio([a for a, _ in self.clip_pairs], [b for _, b in self.clip_pairs]).median - 1

    @property
    def fragments(self) -> float | None:
        """Bytes that the allocator holds and nobody uses, after its cache was emptied, as a share of the chunks'."""
        result = self.result or {}
        if result.get("fragments") is None or not result.get("chunks"):
            return None
        return float(result["fragments"] / result["chunks"])


def figures(row: Row, rates: Rates | None, rows: Sequence[Row]) -> Record:
    """All figures of a row, ``None`` where there is none; ``rows`` hold the one of FSDP2 with the same workload."""
    seconds, floor, job = row.seconds, row.floor(rates), row.job
    peer = next((one for one in rows if one.job.way == "fsdp2" and one.job.group == job.group), None)
    result: dict[str, Any] = row.result or {}
    return {
        "name": job.label,
        "parameters": job.shape.parameters,
        "tokens_per_second": None if seconds is None else job.tokens / seconds,
        "flops": None if seconds is None else job.shape.model_flops(job.tokens) / seconds,
        "seconds": seconds,
        "floor": None if floor is None else {**asdict(floor), "seconds": floor.seconds, "bound": floor.bound},
        "of_the_floor": None if floor is None or not seconds else floor.seconds / seconds,
        "speed_to_fsdp2": row.speed_to(peer),
        "hidden": result.get("hidden"),
        "clip_cost": row.clip_cost,
        "fragments": row.fragments,
        "device_peak": row.peaks.get("device_peak"),
        "host_peak": row.peaks.get("host_peak"),
        "pinned": result.get("pinned"),
        "problem": row.problem,
    }
