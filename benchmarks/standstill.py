"""How long a save in the background stops training, beside one copy of what it saves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks.async_saves import AsyncSaves
from benchmarks.contender import Entry
from benchmarks.rounds import Series, Timing, time_rounds
from benchmarks.savers import MIXED, plain_tensors, trained
from benchmarks.workload import Workload
from lightning_gemini.core import DtypePolicy

COPY, COPY_AGAIN, FRESH = "copy", "copy A/A", "copy to new memory"
FIRST, LATER = "gemini, first save", "gemini, later saves"
DCP_FIRST, DCP_LATER = "DCP async_save", "DCP async_save, one stager"
_SPLIT = ", bf16 split"

#: With what each is compared: one copy of the same tensors into memory that was used before.
REFERENCES = {
    **dict.fromkeys((COPY_AGAIN, FRESH, FIRST, LATER, DCP_FIRST, DCP_LATER), COPY),
    **dict.fromkeys((FIRST + _SPLIT, LATER + _SPLIT), COPY + _SPLIT),
}
SPLIT_LATER = LATER + _SPLIT


@dataclass
class Stop:
    """Something that stops training: ``act`` is what is timed, ``settle`` waits for what it has begun."""

    entry: Entry
    act: Callable[[], object]
    settle: Callable[[], object] = lambda: None

    def stop(self) -> float:
        self.act()
        return 0.0


def measure_standstill(workload: Workload, folder: Path, timing: Timing, seed: int) -> tuple[list[Series], int]:
    """Times everybody; and says how many bytes a copy copies on this rank."""
    parts, plain = _gemini(workload, DtypePolicy(), folder, "")
    contenders = [
        *plain,
        Stop(Entry(COPY_AGAIN, "plain"), _copy(parts)),
        Stop(Entry(FRESH, "plain"), lambda: [part.clone() for part in parts]),
        *_gemini(workload, MIXED, folder, _SPLIT)[1],
        *_dcp(workload, folder),
    ]

    def before(_: Any) -> None:
        for contender in contenders:
            contender.settle()

    series = time_rounds(contenders, Stop.stop, timing, seed, before)  # type: ignore[arg-type]
    before(None)
    return series, sum(part.nbytes for part in parts)


def _copy(parts: Sequence[Tensor]) -> Callable[[], object]:
    targets = [part.clone() for part in parts]
    return lambda: [target.copy_(part) for target, part in zip(targets, parts, strict=True)]


def _gemini(workload: Workload, policy: DtypePolicy, folder: Path, suffix: str) -> tuple[list[Tensor], list[Stop]]:
    first, later = AsyncSaves(workload, policy), AsyncSaves(workload, policy)
    parts = later.parts()

    def again(path: Path) -> None:
        first.wait()
        first.forget()
        _remove(path)

    def on(path: Path) -> None:
        later.wait()
        _remove(path)

    paths = [folder / f"{name}{suffix}".replace(" ", "-") for name in ("first", "later")]
    return parts, [
        Stop(Entry(COPY + suffix, "plain"), _copy(parts)),
        Stop(Entry(FIRST + suffix, "gemini"), lambda: first.start(paths[0]), lambda: again(paths[0])),
        Stop(Entry(LATER + suffix, "gemini"), lambda: later.start(paths[1]), lambda: on(paths[1])),
    ]


def _dcp(workload: Workload, folder: Path) -> list[Stop]:
    tensors = plain_tensors(trained(workload, DtypePolicy())[1])
    kept = DefaultStager(StagingOptions(False, False, False, False))  # as DCP's own, which lives for one save
    return [_dcp_stop(DCP_FIRST, tensors, folder / "dcp", None), _dcp_stop(DCP_LATER, tensors, folder / "kept", kept)]


def _dcp_stop(name: str, tensors: dict[str, Tensor], path: Path, stager: DefaultStager | None) -> Stop:
    group, under_way = dist.new_group(), list[Future[Any]]()

    def act() -> None:
        writer = dcp.FileSystemWriter(path)
        future = dcp.async_save(tensors, storage_writer=writer, process_group=group, async_stager=stager)
        assert isinstance(future, Future)
        under_way.append(future)

    def settle() -> None:
        while under_way:
            under_way.pop().result()
        _remove(path)

    return Stop(Entry(name, "plain"), act, settle)


def _remove(path: Path) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
    dist.barrier()
