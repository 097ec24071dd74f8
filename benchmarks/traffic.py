"""What one step moves, by the engine's own counters, and the least that the order of its units allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks.contender import Contender
from lightning_gemini.core import Chunk, ChunkState, Engine, Home


@dataclass(frozen=True)
class Traffic:
    """One step's counts on one rank, each beside its minimum; bytes of padding are no part of a minimum.

    Attributes:
        units: unit calls in the forward.
        chunks: chunks of the layout.
        resident: the most chunks that were unsharded at one time.
        moved, least: the engine's counters (see ``core.store.Counters``), and their minima.
    """

    units: int
    chunks: int
    resident: int
    moved: dict[str, int]
    least: dict[str, int]


def measure_traffic(contender: Contender) -> Traffic:
    """Runs two steps of a ``gemini`` contender that has trained before: one to watch the units, one to count."""
    engine = contender.engine
    assert engine is not None
    with _watch(engine) as (needs, peak):
        contender.train()
    before = asdict(engine.counters)
    contender.train()
    moved = {key: value - before[key] for key, value in asdict(engine.counters).items()}
    resident = peak[0] if engine.moving else len(engine.layout.chunks)
    return Traffic(len(needs), len(engine.layout.chunks), resident, moved, _least(engine, needs, resident))


def fewest_loads(needs: Sequence[frozenset[int]], capacity: int) -> list[int]:
    """What has to be loaded, in order, if each of ``needs`` must be present in its turn and nothing is at first.

    Belady's rule, which is optimal for pieces of one size: what is needed again the latest makes room.

    Args:
        needs: what is used together, in order.
        capacity: pieces that may be present at a time; a need larger than that takes the room all the same.
    """
    later: dict[int, list[int]] = {}
    for turn in range(len(needs) - 1, -1, -1):
        for piece in needs[turn]:
            later.setdefault(piece, []).append(turn)
    present: set[int] = set()
    loads: list[int] = []
    for need in needs:
        for piece in sorted(need - present):
            while len(present) >= capacity and present - need:
                present.remove(max(present - need, key=lambda p: (later[p][-1] if later[p] else len(needs), p)))
            present.add(piece)
            loads.append(piece)
        for piece in need:
            later[piece].pop()
    return loads


def _least(engine: Engine, needs: Sequence[frozenset[int]], resident: int) -> dict[str, int]:
    layout, store = engine.layout, engine.store
    ranks = layout.world_size
    used = [chunk.used * chunk.kind.dtype.itemsize for chunk in layout.chunks]
    moving = [chunk.home is not Home.FULL for chunk in store.chunks]
    loads = [c for c in fewest_loads([*needs, *reversed(needs)], resident) if moving[c]]
    updated = [chunk for chunk in layout.chunks if chunk.kind.updated]
    gathered = [*loads, *(chunk.index for chunk in updated if not moving[chunk.index])]
    hosted = [chunk.index for chunk in updated if store.chunks[chunk.index].home is Home.HOST]
    from_host = [c for c in loads if store.chunks[c].home is Home.HOST]
    return {
        "unshards": len(loads),
        "gathered_bytes": sum(used[c] for c in gathered) * (ranks - 1) // ranks,
        "fetched_bytes": sum(used[c] for c in from_host) // ranks,
        "offloaded_bytes": sum(used[c] for c in hosted) // ranks,
        "reduces": len(updated) if ranks > 1 else 0,
        # in the dtype that the contenders reduce in, fp32
        "reduced_bytes": sum(chunk.used for chunk in updated) * 4 * (ranks - 1) // ranks,
        "updates": len(updated),
    }


@contextmanager
def _watch(engine: Engine) -> Iterator[tuple[list[frozenset[int]], list[int]]]:
    """Lists which chunks each unit call in a forward needs, and the most chunks that are unsharded at one time."""
    needs: list[frozenset[int]] = []
    running: list[frozenset[int]] = []
    peak = [sum(c.state is not ChunkState.FREE for c in engine.store.chunks)]

    def enter(own: frozenset[int], *_: Any) -> None:
        running.append(own.union(*running[-1:]))
        needs.append(running[-1])

    def leave(*_: Any) -> None:
        running.pop()

    def count(move: Callable[..., None], chunk: Chunk, *rest: str, ahead: bool = False) -> None:
        move(chunk, *rest, ahead=ahead)
        peak[0] = max(peak[0], sum(c.state is not ChunkState.FREE for c in engine.store.chunks))

    handles = []
    for unit in engine.units:
        own = frozenset(engine.layout.place(param)[0] for param in unit.params)
        handles += [
            unit.module.register_forward_pre_hook(partial(enter, own)),
            unit.module.register_forward_hook(leave),
        ]
    engine.store.start = partial(count, engine.store.start)  # type: ignore[method-assign]
    try:
        yield needs, peak
    finally:
        del engine.store.start
        for handle in handles:
            handle.remove()
