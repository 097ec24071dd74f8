"""Tiers of memory: what chunks may use, what they use, and buffers that are used again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lightning_gemini.core.errors import ConfigurationError, OutOfBudgetError

T = TypeVar("T")

#: What torch says where it has no type of its own for it: the CPU's allocator, and cuBLAS for its workspace.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(value: int | float | str, name: str) -> int:
    """``"20GiB"``, ``"512 MB"`` or a number of bytes, as an int.

    Raises:
        ConfigurationError: it does not parse, or is not positive; the message calls the setting ``name``.
    """
    number: float | None = None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", value)
        if match and match[2].lower() in _UNITS:
            number = float(match[1]) * _UNITS[match[2].lower()]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    if number is None or not 1 <= number < float("inf"):
        raise ConfigurationError(
            f"{name} must be a positive number of bytes, or a text such as '20GiB' or '512MB', got {value!r}."
        )
    return int(number)


def format_bytes(nbytes: float) -> str:
    """``nbytes`` for people: ``"1.50 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory has run out."""
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        return any(text in str(error) for text in _OUT_OF_MEMORY)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError))


class Allocator:
    """Takes memory from the system for a tier; every allocation of the engine that may fail goes through it."""

    def run(self, make: Callable[[], T]) -> T:
        """What ``make`` returns, which allocates.

        Raises:
            torch.OutOfMemoryError, RuntimeError: the system has no memory for it (see :func:`out_of_memory`).
        """
        return make()


@dataclass(frozen=True)
class Shortage:
    """An allocation that the system refused at first.

    Attributes:
        what: it was for.
        nbytes: of it.
        freed: what was freed for it, for people, in that order.
    """

    what: str
    nbytes: int
    freed: tuple[str, ...]


@dataclass
class Tier:
    """One kind of memory: bytes in use, their peak, and the bytes that may be in use.

    ``capacity`` is ``None`` where nothing bounds it. ``spare`` is asked to give so many bytes back when room is short.
    ``refusal`` says in words that there is no room for so many bytes of something; a sentence by default.
    ``work`` is the part of ``used`` that lives for a moment of a step only, such as gradient buffers; ``work_peak`` is
    the most of it since somebody set it back.

    What is counted and what the system has are two things: :meth:`take` counts, :meth:`allocate` asks the system. If
    that refuses, ``relieve`` frees one thing after the other and says what it was; ``shortages`` are the refusals that
    this has helped against, until somebody plans for less.
    """

    name: Literal["device", "host"]
    device: torch.device
    capacity: int | None = None
    used: int = 0
    peak: int = 0
    work: int = 0
    work_peak: int = 0
    spare: Callable[[int], None] | None = None
    refusal: Callable[[int, str], str] | None = None
    relieve: Callable[[], Iterator[str]] | None = None
    allocator: Allocator = field(default_factory=Allocator)
    shortages: list[Shortage] = field(default_factory=list)
    _relieving: bool = False

    def room(self, nbytes: int) -> bool:
        """Whether ``nbytes`` more are allowed."""
        return self.capacity is None or self.used + nbytes <= self.capacity

    def require(self, nbytes: int, what: str) -> None:
        """Makes sure that ``what`` could take ``nbytes`` now.

        Raises:
            OutOfBudgetError: it would be more than the capacity.
        """
        if not self.room(nbytes) and self.spare is not None:
            self.spare(nbytes)
        if not self.room(nbytes) and self.refusal is not None:
            raise OutOfBudgetError(self.refusal(nbytes, what))
        if not self.room(nbytes):
            raise OutOfBudgetError(
                f"{what} needs {format_bytes(nbytes)} of {self.name} memory, but {format_bytes(self.used)} of "
                f"{format_bytes(self.capacity or 0)} are in use. Give more memory ({self.name}_memory=...), use more "
                "ranks, or make the units or the chunks smaller."
            )

    def take(self, nbytes: int, what: str, work: bool = False) -> None:
        """Counts ``nbytes`` as used by ``what``, and as ``work`` if it is that.

        Raises:
            OutOfBudgetError: it would be more than the capacity; nothing is counted then.
        """
        self.require(nbytes, what)
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        if work:
            self.work += nbytes
            self.work_peak = max(self.work_peak, self.work)

    def give(self, nbytes: int, work: bool = False) -> None:
        """Counts ``nbytes`` as free again."""
        self.used -= nbytes
        if work:
            self.work -= nbytes

    def allocate(self, make: Callable[[], T], nbytes: int, what: str) -> T:
        """What ``make`` returns, which allocates ``nbytes`` for ``what``; they are counted already.

        Raises:
            OutOfBudgetError: the system has no memory for it, whatever is freed.
        """
        try:
            return self.allocator.run(make)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            refusal = error
        freed: list[str] = []
        for one in self._relief():
            freed.append(one)
            try:
                made = self.allocator.run(make)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                continue
            self.shortages.append(Shortage(what, nbytes, tuple(name for name in freed if name)))
            return made
        remedy = "or leave a larger margin" if self.name == "device" else "or use more ranks"
        raise OutOfBudgetError(
            f"{what} needs {format_bytes(nbytes)} of {self.name} memory, and the system does not give them, though "
            f"chunks use {format_bytes(self.used)} of {format_bytes(self.capacity or self.used)} only ({refusal}). "
            f"Lower {self.name}_memory, {remedy}."
        ) from refusal

    def empty(self, numel: int, dtype: torch.dtype, what: str) -> Tensor:
        """A flat tensor with undefined content, of bytes that are counted already.

        Raises:
            OutOfBudgetError: see :meth:`allocate`.
        """

        def make() -> Tensor:
            with torch.inference_mode(False):
                return torch.empty(numel, dtype=dtype, device=self.device)

        return self.allocate(make, numel * dtype.itemsize, what)

    def _relief(self) -> Iterator[str]:
        """Frees what can be spared; what is allocated for that purpose gets no relief of its own."""
        if self._relieving:
            return
        self._relieving = True
        try:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            yield ""
            if self.relieve is not None:
                yield from self.relieve()
        finally:
            self._relieving = False


class BufferPool:
    """Flat buffers of a tier, kept for the next use: fresh host memory costs a page fault per 4 KiB.

    Args:
        work: whether they count as work of a moment (see :class:`Tier`).
    """

    def __init__(self, tier: Tier, work: bool = False) -> None:
        self._tier = tier
        self._work = work
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def get(self, numel: int, dtype: torch.dtype, what: str) -> Tensor:
        """A buffer of ``numel`` elements with undefined content."""
        free = self._free.get((numel, dtype))
        if free:
            return free.pop()
        nbytes = numel * dtype.itemsize
        if not self._tier.room(nbytes):
            self.clear()
        self._tier.take(nbytes, what, self._work)
        try:
            return self._tier.empty(numel, dtype, what)
        except BaseException:
            self._tier.give(nbytes, self._work)
            raise

    def drop(self, buffer: Tensor) -> None:
        """Takes back a buffer whose memory is not to be used again."""
        self._tier.give(buffer.nbytes, self._work)

    def put(self, buffer: Tensor) -> None:
        """Takes back a buffer that nobody uses any more."""
        self._free.setdefault((buffer.numel(), buffer.dtype), []).append(buffer)

    def clear(self, keep: int = 0) -> None:
        """Frees the buffers that wait for their next use, but for ``keep`` bytes, the smaller ones first."""
        for buffers in sorted(self._free.values(), key=lambda same: same[0].nbytes if same else 0):
            spared = min(len(buffers), keep // buffers[0].nbytes) if buffers else 0
            self._tier.give(sum(buffer.nbytes for buffer in buffers[spared:]), self._work)
            del buffers[spared:]
            keep -= sum(buffer.nbytes for buffer in buffers)


class MemoryProbe:
    """The most bytes that torch had given out on a device since the last :meth:`reset`, whoever asked for them.

    On the CPU nobody counts them: there it says 0, and an emulated device is as large as the chunks in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None

    def reset(self) -> None:
        """Begins to look for the most from now on."""
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """Bytes."""
        return 0 if self._device is None else torch.cuda.max_memory_allocated(self._device)
