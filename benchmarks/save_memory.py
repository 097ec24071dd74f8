"""The most memory that a save and a load take beside what is there anyway; each way in processes of its own."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.async_saves import AsyncSaves
from benchmarks.footprint import most_extra, recorded
from benchmarks.savers import make_savers
from benchmarks.workload import Workload
from lightning_gemini.core import DtypePolicy

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's mallopt
_LARGE = 2**18


@dataclass(frozen=True)
class Extra:
    """The most bytes on one rank at a time.

    Attributes:
        save: that torch's allocator gave out, beyond those before the save.
        load: the same beyond those after the load, which stay: a run that is resumed has weights, and no states yet.
        save_resident, load_resident: the same of resident memory, with Python's own and mapped files; ``None`` where
            the system does not tell.
    """

    save: int
    save_resident: int | None
    load: int
    load_resident: int | None


@dataclass(frozen=True)
class AsyncExtra:
    """The first save in the background: bytes of its copy, and what was resident beyond that and the bytes before."""

    snapshot: int
    resident: int | None


def measure_extra(name: str, workload: Workload, folder: Path) -> Extra:
    """Measures one way to save and to load."""
    _return_memory_at_once()
    (saver,) = make_savers((name,), workload, folder)
    saver.save()  # what is made once
    saver.tidy()
    with recorded() as recorder:
        saver.save()
    save, save_resident = most_extra(recorder), _resident_extra(saver.tidy, saver.save)
    saver.forget()
    saver.load()
    saver.forget()
    with recorded() as recorder:
        saver.load()
    load, load_resident = most_extra(recorder), _resident_extra(saver.forget, saver.load)
    saver.tidy()
    return Extra(save, save_resident, load, load_resident)


def measure_async(workload: Workload, policy: DtypePolicy, folder: Path) -> AsyncExtra:
    """Measures the first save in the background, which makes the memory for its copy."""
    _return_memory_at_once()
    saves = AsyncSaves(workload, policy)

    def save() -> None:
        saves.start(folder / "in the background")
        saves.wait()

    save()  # what is made once
    # the copy's memory stays, and so is among the bytes after the save
    resident = _resident_extra(saves.forget, save)
    return AsyncExtra(sum(part.nbytes for part in saves.parts()), resident)


def _resident_extra(prepare: Callable[[], object], work: Callable[[], object]) -> int | None:
    """The most bytes that were resident during ``work``, beyond those before and after it."""
    prepare()
    _trim()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        work()
        peak = _status("VmHWM")
        _trim()
        return peak - max(before, _status("VmRSS"))
    work()
    return None


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"the system does not tell {key}")
    return int(found[1]) * 1024


def _trim() -> None:
    """Gives memory that nobody uses back to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _return_memory_at_once() -> None:
    """Has large pieces of memory mapped one by one, so that what is freed is not resident any more."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)
