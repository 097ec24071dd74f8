"""Timelines for tests: small, exact, and of any size."""

from __future__ import annotations

from lightning_gemini.core.timeline import Timeline, TimelineChunk, TimelineMoment

MIB = 2**20


def small() -> Timeline:
    """Four chunks on rank 0 of 2: one in host memory, one at home on the device, one frozen on the host, one kept."""
    chunks = (
        TimelineChunk(0, 10 * MIB, False, "model.layers.0.weight", True),
        TimelineChunk(1, 10 * MIB, True, "model.layers.1.weight", True),
        TimelineChunk(2, 10 * MIB, False, "model.layers.2.weight", False),
        TimelineChunk(3, 4 * MIB, True, "model.head.weight", True, kept=True),
    )
    homes = 9 * MIB  # half of chunk 1, and chunk 3
    moments = (
        moment("model.layers.0", 0, homes, (0,), (0,), (1,), waited=0.002, fetched=5 * MIB),
        moment("model.layers.1", 1, homes, (0, 1), (1,), (2,), fetched=5 * MIB),
        moment("model.layers.2", 2, homes, (0, 1, 2), (1, 2), (), other=2 * MIB),
        moment("model.head", 3, homes, (2,), (3, 2), (), backward=True, other=6 * MIB, offloaded=5 * MIB),
    )
    return Timeline("training step", 0, 2, 50 * MIB, chunks, moments, 0.5, "4 chunks\nand the rest", 0.2, 0.05)


def moment(
    reason: str, chunk: int, homes: int, resident: tuple[int, ...], pinned: tuple[int, ...], coming: tuple[int, ...],
    backward: bool = False, waited: float = 0.0, other: int = MIB, fetched: int = 0, offloaded: int = 0,
    updating: tuple[int, ...] = (),
) -> TimelineMoment:  # fmt: skip
    """A moment in which each unsharded chunk, those that are coming included, takes 10 MiB."""
    unsharded = 10 * MIB * len({*resident, *coming})
    return TimelineMoment(
        reason=reason, backward=backward, chunk=chunk, seconds=0.1, waited=waited, resident=resident, pinned=pinned,
        coming=coming, updating=updating, homes=homes, unsharded=unsharded, other=other, fetched=fetched,
        offloaded=offloaded,
    )  # fmt: skip


def sweep(chunks: int, moments: int) -> Timeline:
    """A step that goes through host chunks of 10 MiB once: one in use, the next one coming."""
    found = tuple(TimelineChunk(i, 10 * MIB, False, f"layers.{i}.weight", True) for i in range(chunks))
    steps = []
    for index in range(moments):
        now = index * chunks // moments
        coming = (now + 1,) if now + 1 < chunks else ()
        steps.append(moment(f"layers.{now}", now, 0, (now,), (now,), coming, waited=1e-3, fetched=index))
    return Timeline("training step", 0, 1, None, found, tuple(steps), 1.0, "report", 0.0, 0.0)
