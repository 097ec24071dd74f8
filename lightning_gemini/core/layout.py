"""Parameters -> chunks: a pure plan, the same on every rank, that can be printed.

The scheme is Gemini's (Colossal-AI) and PatrickStar's: consecutive parameters of one kind are packed into flat
buffers of one size, every buffer is split evenly over the ranks, and the size is searched for the least waste.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

import torch

from lightning_gemini.core.errors import ConfigurationError

#: Every parameter and every shard starts at a multiple of this many elements: 128 bytes in bf16, what vector
#: instructions and cuBLAS want at the least. States in blocks ask for more.
ALIGNMENT = 64

_TAG_BYTES = 4
_MIN_AUTO_NUMEL, _MAX_AUTO_NUMEL = 2**17, 2**25
_AUTO_CHUNKS, _AUTO_CANDIDATES = 32, 64


@dataclass(frozen=True)
class ParamSpec:
    """What the layout has to know of one parameter.

    ``dtype`` is the dtype it is computed in, ``trainable`` whether it requires a gradient now. ``optimizer`` and
    ``group`` are indices of the optimizer and of the parameter group that have it, ``None`` where nobody does.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    optimizer: int | None = None
    group: int | None = None

    @cached_property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def kind(self) -> Kind:
        return Kind(self.dtype, self.trainable, self.optimizer, self.group)


@dataclass(frozen=True)
class Kind:
    """What the parameters of one chunk have in common."""

    dtype: torch.dtype
    trainable: bool
    optimizer: int | None
    group: int | None

    @property
    def updated(self) -> bool:
        """Whether an optimizer has these parameters, so that their gradients, once there are any, are worth keeping."""
        return self.optimizer is not None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        if not self.trainable:
            return f"{dtype} frozen"
        return f"{dtype} optimizer {self.optimizer}.{self.group}" if self.updated else f"{dtype} no optimizer"


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in its chunk, in elements; ``param`` indexes :attr:`Layout.params`."""

    param: int
    offset: int
    numel: int

    @property
    def end(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True)
class ChunkSpec:
    """One chunk: ``numel`` elements of one dtype, the last of which carry the chunk's tag."""

    index: int
    kind: Kind
    numel: int
    slots: tuple[Slot, ...]

    @cached_property
    def used(self) -> int:
        return sum(slot.numel for slot in self.slots)

    @cached_property
    def nbytes(self) -> int:
        return self.numel * self.kind.dtype.itemsize

    @property
    def end(self) -> int:
        """The end of the last parameter, in elements; behind it lie padding and the tag."""
        return self.slots[-1].end

    @property
    def first_param(self) -> int:
        return min(slot.param for slot in self.slots)


@dataclass(frozen=True)
class Layout:
    """The whole assignment of parameters to chunks for ``world_size`` ranks."""

    params: tuple[ParamSpec, ...]
    chunks: tuple[ChunkSpec, ...]
    chunk_numel: int
    world_size: int
    alignment: int = ALIGNMENT

    @cached_property
    def _places(self) -> dict[int, tuple[int, Slot]]:
        return {slot.param: (chunk.index, slot) for chunk in self.chunks for slot in chunk.slots}

    def place(self, param: int) -> tuple[int, Slot]:
        """The chunk's index and the slot of parameter number ``param``."""
        return self._places[param]

    def shard_numel(self, chunk: int) -> int:
        """Elements of the chunk that one rank owns."""
        return self.chunks[chunk].numel // self.world_size

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all chunks, unsharded."""
        return sum(chunk.nbytes for chunk in self.chunks)

    @cached_property
    def waste(self) -> float:
        """The share of the chunks' bytes that holds no parameter."""
        used = sum(chunk.used * chunk.kind.dtype.itemsize for chunk in self.chunks)
        return 1 - used / self.nbytes if self.nbytes else 0.0

    @cached_property
    def reduce_order(self) -> tuple[int, ...]:
        """Chunks in the order in which a backward that mirrors the definition order completes them.

        A chunk is complete when its earliest parameter has its gradient, so the chunk whose earliest parameter is
        defined last comes first.
        """
        updated = [chunk for chunk in self.chunks if chunk.kind.updated]
        return tuple(c.index for c in sorted(updated, key=lambda c: c.first_param, reverse=True))

    @cached_property
    def fingerprint(self) -> int:
        """31 bits that differ, in all likelihood, between two layouts."""
        text = repr((self.params, self.chunks, self.world_size)).encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1

    def __str__(self) -> str:
        """A table with a line for each run of like chunks, and the totals."""
        rows = [("chunks", "kind", "parameters", "elements", "used", "MiB/rank")]
        for _, run in groupby(self.chunks, key=lambda chunk: (chunk.kind, chunk.numel)):
            alike = list(run)
            numel = sum(chunk.numel for chunk in alike)
            rows.append(
                (
                    str(alike[0].index) if len(alike) == 1 else f"{alike[0].index}-{alike[-1].index}",
                    str(alike[0].kind),
                    str(sum(len(chunk.slots) for chunk in alike)),
                    f"{alike[0].numel:,}" if len(alike) == 1 else f"{len(alike)} x {alike[0].numel:,}",
                    f"{sum(chunk.used for chunk in alike) / numel:.1%}",
                    f"{sum(chunk.nbytes for chunk in alike) / self.world_size / 2**20:.2f}",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        forms = ["{:<{}}", "{:<{}}", *["{:>{}}"] * 4]
        lines = ["  ".join(f.format(cell, w) for f, cell, w in zip(forms, row, widths, strict=True)) for row in rows]
        total = (
            f"{len(self.params)} parameters in {len(self.chunks)} chunks of up to {self.chunk_numel:,} elements, "
            f"{self.nbytes / 2**20:.2f} MiB over {self.world_size} rank(s), {self.waste:.1%} of it unused"
        )
        return "\n".join([*lines, total])


def plan_layout(
    params: Sequence[ParamSpec],
    world_size: int,
    chunk_size: int | Literal["auto"] = "auto",
    alignment: int = ALIGNMENT,
    limit: int | None = None,
) -> Layout:
    """Packs ``params`` (in definition order) into chunks.

    Args:
        params: the parameters, each once.
        world_size: ranks that share each chunk evenly.
        chunk_size: elements in a chunk, or ``"auto"`` for the size with the least waste among those that give
            about 32 to 64 chunks. A parameter that does not fit gets a chunk of its own; the last chunk of each
            kind ends where its parameters end.
        alignment: elements at a multiple of which every parameter and every shard starts.
        limit: with ``"auto"``, elements beyond which chunks are too large for the memory they go to.

    Raises:
        ConfigurationError: ``chunk_size`` is smaller than one aligned shard per rank.
    """
    step = alignment * world_size
    if chunk_size == "auto":
        chunk_size = search_chunk_numel(params, world_size, alignment, limit)
    elif chunk_size < step:
        raise ConfigurationError(
            f"chunk_size must be at least {step} elements ({world_size} rank(s) x an alignment of {alignment}), "
            f"got {chunk_size}. Give a larger size, or chunk_size='auto'."
        )
    size = _round_up(chunk_size, step)
    chunks = [
        ChunkSpec(index, kind, numel, slots)
        for index, (kind, numel, slots) in enumerate(_pack(params, size, step, alignment))
    ]
    return Layout(tuple(params), tuple(chunks), size, world_size, alignment)


def search_chunk_numel(
    params: Sequence[ParamSpec], world_size: int, alignment: int = ALIGNMENT, limit: int | None = None
) -> int:
    """The chunk size, in elements, that wastes the least; the smallest of several equal ones."""
    step = alignment * world_size
    total = sum(spec.numel for spec in params)
    low = min(max(total // _AUTO_CHUNKS, _MIN_AUTO_NUMEL), _MAX_AUTO_NUMEL)
    if limit is not None:
        low = min(low, limit // 2)
    low = _round_up(max(low, 1), step)
    stride = _round_up(max(low // _AUTO_CANDIDATES, 1), step)

    def waste(size: int) -> int:
        return sum(
            (numel - sum(s.numel for s in slots)) * kind.dtype.itemsize
            for kind, numel, slots in _pack(params, size, step, alignment)
        )

    return min(range(low, 2 * low + 1, stride), key=lambda size: (waste(size), size))


def tag_numel(dtype: torch.dtype) -> int:
    """Elements of ``dtype`` at a chunk's end that the tag (an int32) takes."""
    return -(-_TAG_BYTES // dtype.itemsize)


def _pack(
    params: Iterable[ParamSpec], size: int, step: int, alignment: int
) -> Iterator[tuple[Kind, int, tuple[Slot, ...]]]:
    """Next-fit per kind, kinds in the order of their first parameter."""
    kinds: dict[Kind, list[tuple[int, ParamSpec]]] = {}
    for index, spec in enumerate(params):
        kinds.setdefault(spec.kind, []).append((index, spec))
    for kind, members in kinds.items():
        tag = tag_numel(kind.dtype)
        slots: list[Slot] = []
        for index, spec in members:
            offset = _round_up(slots[-1].end, alignment) if slots else 0
            if slots and offset + spec.numel + tag > size:
                yield kind, size, tuple(slots)
                slots, offset = [], 0
            slots.append(Slot(index, offset, spec.numel))
            if spec.numel + tag > size:
                yield kind, _round_up(spec.numel + tag, step), tuple(slots)
                slots = []
        if slots:
            yield kind, _round_up(slots[-1].end + tag, step), tuple(slots)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
