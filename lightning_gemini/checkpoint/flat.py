"""Tensors that are spread over the ranks in runs of elements, as torch.distributed.checkpoint wants to see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from lightning_gemini.checkpoint.boxes import Box, boxes
from lightning_gemini.core.errors import ConfigurationError
from lightning_gemini.optim.masters import join

_HOST_BLOCK = 2**16
_DEVICE_BLOCK = 2**22


def block_numel(device: torch.device) -> int:
    """Elements to convert at a time on ``device``: what is made on the way stays small, and in a processor's cache."""
    return _HOST_BLOCK if device.type == "cpu" else _DEVICE_BLOCK


class Source:
    """Where elements come from: a flat tensor, or the high and the low halves of fp32 values.

    What belongs to one chunk is one source, whatever tensors lie in it, so that it is copied once.
    """

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype if len(self.parts) == 1 else torch.float32

    def values(self, start: int, stop: int) -> Tensor:
        """The elements ``start:stop``: a view, or joined from their halves in host memory."""
        if len(self.parts) == 1:
            return self.parts[0][start:stop]
        values = torch.empty(stop - start, dtype=torch.float32)
        at = 0
        for block in self.blocks(start, stop):
            values[at : at + len(block)] = block
            at += len(block)
        return values

    def blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """The elements ``start:stop``, as many at a time as are joined at once."""
        if len(self.parts) == 1:
            yield self.parts[0][start:stop]
            return
        high, low = self.parts
        numel = block_numel(low.device)
        for first in range(start, stop, numel):
            last = min(first + numel, stop)
            yield join(high[first:last].to(low.device), low[first:last])

    def freeze(self, copy: Callable[[Tensor], Tensor]) -> None:
        """Puts copies in the place of the tensors."""
        self.parts = tuple(copy(part) for part in self.parts)


@dataclass(frozen=True)
class Run:
    """The elements from ``start`` of a tensor's memory on, ``numel`` of them: those of ``source`` from ``at`` on."""

    start: int
    numel: int
    source: Source
    at: int


class FlatTensor(Tensor):
    """A tensor of which this rank holds some runs of elements, or none.

    It has a shape, a dtype and no values of its own: whatever computes with it raises. ``torch.distributed.checkpoint``
    asks it for blocks (see :mod:`boxes`), which are views where the source is one.

    Args:
        shape, stride: of the whole tensor, dense.
        dtype: of its elements.
        runs: what this rank holds of it.
    """

    runs: tuple[Run, ...]

    def __new__(
        cls, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, runs: Sequence[Run]
    ) -> FlatTensor:
        made: FlatTensor = Tensor._make_wrapper_subclass(
            cls, tuple(shape), strides=tuple(stride), dtype=dtype, device=torch.device("cpu")
        )
        made.runs = tuple(runs)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            whole: FlatTensor = args[0]
            return cls(whole.shape, whole.stride(), whole.dtype, whole.runs)
        raise ConfigurationError(
            f"{func} was called for a tensor of a sharded checkpoint, of which each rank holds a part. In "
            "on_save_checkpoint such tensors can be left out, renamed or replaced; to compute with them use "
            "GeminiStrategy(state_dict_type='full')."
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FlatTensor({list(self.shape)}, {self.dtype}, {sum(run.numel for run in self.runs)} elements here)"

    def whole(self) -> Tensor:
        """All of it, a copy in host memory, where this rank holds all of it."""
        memory = torch.empty(self.shape.numel(), dtype=self.dtype)
        for run in self.runs:
            memory[run.start : run.start + run.numel] = run.source.values(run.at, run.at + run.numel)
        return memory.as_strided(self.shape, self.stride())

    @cached_property
    def _pieces(self) -> list[tuple[Run, Box]]:
        return [
            (run, box)
            for run in self.runs
            for box in boxes(self.shape, self.stride(), run.start, run.start + run.numel)
        ]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, torch.Size(box.offsets)),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(_metadata(box), properties, self.shape),
            )
            for _, box in self._pieces
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_metadata(box) for _, box in self._pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        run, box = self._piece(index)
        first = box.first - run.start + run.at
        values = run.source.values(first, first + prod(box.sizes))
        return values.as_strided(box.sizes, self.stride(), values.storage_offset())

    def tensor_parts(self, index: MetadataIndex) -> Iterator[Tensor] | None:
        """A block, cut into 1-d tensors in the order of its elements (row by row), where it is not in memory as it is.

        For :class:`CheckpointWriter`, which then never has the whole of it.
        """
        run, box = self._piece(index)
        contiguous = _is_row_major(box.sizes, self.stride())
        if len(run.source.parts) == 1 or not contiguous:
            return None
        first = box.first - run.start + run.at
        return run.source.blocks(first, first + prod(box.sizes))

    def _piece(self, index: MetadataIndex) -> tuple[Run, Box]:
        for run, box in self._pieces:
            if index.offset is None or tuple(index.offset) == box.offsets:
                return run, box
        raise ValueError(f"no block of {index.fqn} begins at {index.offset} on this rank")


def _is_row_major(sizes: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for size, step in zip(reversed(sizes), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _metadata(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
