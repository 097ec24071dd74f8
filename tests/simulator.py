"""Executes a plan to the letter and checks it; knows nothing of how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_gemini.core.step_plan import ChunkBytes, StepPlan
from lightning_gemini.core.trace import Trace


@dataclass
class Simulated:
    """What the last cycle moved, and the most bytes in each moment, ``other`` not included.

    Attributes:
        late: by moment, whether its chunk had to be unsharded on demand.
        waiting: the most chunks that were unsharded ahead of their need at one time.
    """

    fetched: int = 0
    gathered: int = 0
    offloaded: int = 0
    peak: list[int] = field(default_factory=list)
    late: list[bool] = field(default_factory=list)
    waiting: int = 0


def simulate(
    trace: Trace,
    chunks: Sequence[ChunkBytes],
    on_device: Sequence[bool],
    step: StepPlan,
    cycles: int = 3,
    device: int | None = None,
    window: int | None = None,
) -> Simulated:
    """Runs ``cycles`` steps, the first with nothing unsharded, and asserts that each is possible.

    What is unsharded is a set; it never exceeds ``device`` with homes and ``other``, nor ``window`` beside what is in
    use; nothing in use is freed, nothing is unsharded twice, nothing stale is used.
    """
    whole = {c for c, chunk in enumerate(chunks) if on_device[c] and chunk.whole}
    homes = sum(chunk.kept for c, chunk in enumerate(chunks) if on_device[c])
    resident: set[int] = set()
    result = Simulated()
    ahead: set[int] = set()

    def unshard(chunk: int) -> None:
        assert chunk not in whole, f"{chunk} is always there"
        assert chunk not in resident, f"{chunk} is unsharded twice"
        resident.add(chunk)
        result.fetched += 0 if on_device[chunk] else chunks[chunk].fetch
        result.gathered += chunks[chunk].gather

    for _ in range(cycles):
        result = Simulated()
        if trace.updates:
            resident -= {c for c in resident if chunks[c].trained}
        resident &= set(step.start)
        assert len(set(step.start)) == len(step.start)
        for chunk in step.start:
            if chunk not in resident:
                unshard(chunk)
                ahead.add(chunk)
                result.waiting = max(result.waiting, len(ahead))
        before: tuple[int, ...] = ()
        for index, moment in enumerate(trace.moments):
            for chunk in step.evict[index]:
                assert chunk in resident, f"moment {index} frees {chunk}, which is not unsharded"
                assert chunk not in moment.pinned, f"moment {index} frees {chunk}, which is in use"
                resident.remove(chunk)
            late = moment.chunk not in resident | whole
            if late:
                unshard(moment.chunk)
            ahead.discard(moment.chunk)
            result.late.append(late)
            for chunk in step.prefetch[index]:
                assert chunk not in moment.pinned
                unshard(chunk)
                ahead.add(chunk)
            result.waiting = max(result.waiting, len(ahead))
            assert resident | whole >= set(moment.pinned), f"moment {index} lacks a chunk that is in use"
            assert set(before) & set(moment.pinned) - {moment.chunk} <= resident | whole
            unsharded = sum(chunks[c].full for c in resident)
            idle = sum(chunks[c].full for c in resident - set(moment.pinned))
            result.peak.append(homes + unsharded)
            assert device is None or homes + unsharded + moment.other <= device, f"moment {index} is over the budget"
            assert window is None or idle <= window, f"moment {index} is over the window"
            before = moment.pinned
        if trace.has_backward:
            result.offloaded = sum(chunks[c].offload for c in trace.uses if not on_device[c])
    return result
