"""How long saves and loads take, in interleaved rounds, on disk and where files are in memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash

from benchmarks.estimate import median
from benchmarks.rounds import Series, Timing, time_rounds
from benchmarks.savers import Saver, make_savers, trained
from benchmarks.workload import Workload
from lightning_gemini.checkpoint.hashing import BLOCK_BYTES
from lightning_gemini.core import DtypePolicy

ON_DISK, IN_MEMORY, LOAD = "save on disk", "save in memory", "load"

_FEWER = 2  # a save to the disk takes long, and half of the rounds will do
_HASHED = 2**27  # bytes
_HASHINGS = 9
_FP32_BYTES = 4


@dataclass(frozen=True)
class Times:
    """What was timed.

    Attributes:
        series: by what was done: ``ON_DISK``, ``IN_MEMORY``, ``LOAD``.
        nbytes: of files, by contender.
        hash_rate: bytes per second of checksums, the slowest rank's.
        chunk_bytes: of the largest chunk, in fp32 as files have it.
    """

    series: dict[str, list[Series]]
    nbytes: dict[str, int]
    hash_rate: float
    chunk_bytes: int


def measure_times(
    names: Sequence[str], workload: Workload, disk: Path | None, memory: Path | None, rounds: int, seed: int
) -> Times:
    """Times the contenders ``names``; every rank has to call.

    Whatever a contender leaves to the system is brought to the disk before the next sample, and every save is to a new
    path. Loads are from the files that were written last: all of them are in the system's cache.

    Args:
        disk, memory: folders for files; ``None`` for none.
    """
    savers = make_savers(names, workload, disk or memory or Path())
    series: dict[str, list[Series]] = {}
    if disk is not None:
        series[ON_DISK] = _time_saves(savers, Timing(rounds=max(rounds // _FEWER, 1)), seed)
    if memory is not None:
        for saver in savers:
            saver.tidy()
            saver.folder = memory
        savers = [saver for saver in savers if saver.synced]  # there is nothing to leave to the system
        series[IN_MEMORY] = _time_saves(savers, Timing(rounds=rounds), seed)
    nbytes = {saver.entry.name: saver.nbytes() for saver in savers}
    series[LOAD] = time_rounds(savers, Saver.load, Timing(rounds=rounds), seed)  # type: ignore[arg-type]
    for saver in savers:
        saver.tidy()
    layout = trained(workload, DtypePolicy(), steps=0)[1].layout
    return Times(series, nbytes, _hash_rate(), max(chunk.numel for chunk in layout.chunks) * _FP32_BYTES)


def _hash_rate() -> float:
    """Block by block, as checksums are taken, on all ranks at once."""
    data = memoryview(torch.randint(256, (_HASHED,), dtype=torch.uint8).numpy())
    seconds = []
    for _ in range(_HASHINGS):
        dist.barrier()
        start = time.perf_counter()
        digest = xxhash.xxh3_64()
        for first in range(0, _HASHED, BLOCK_BYTES):
            digest.update(data[first : first + BLOCK_BYTES])
        digest.hexdigest()
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(median(seconds))
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return _HASHED / slowest.item()


def _time_saves(savers: Sequence[Saver], timing: Timing, seed: int) -> list[Series]:
    def before(saver: Saver) -> None:
        for one in savers:
            if not one.synced:
                one.settle()
        saver.tidy()

    return time_rounds(savers, Saver.save, timing, seed, before)  # type: ignore[arg-type]
