"""Tensors that say to torch.distributed.checkpoint which boxes of a larger tensor they are."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]


class Boxed(torch.Tensor):
    """This rank's boxes of a tensor; ``get`` makes the content of one when it is asked for."""

    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, boxes: Sequence[Box], get: Callable[[Box], Tensor]
    ) -> Any:
        self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device="cpu")
        self.boxes, self.get = list(boxes), get
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} on boxes")

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, torch.Size(offsets)),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
                    TensorProperties(dtype=self.dtype),
                    self.size(),
                ),
            )
            for offsets, sizes in self.boxes
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.get(next(box for box in self.boxes if box[0] == tuple(index.offset)))


def part(full: Tensor, box: Box) -> Tensor:
    """The box of ``full``, a view."""
    for dim, (offset, size) in enumerate(zip(*box, strict=True)):
        full = full.narrow(dim, offset, size)
    return full


def boxed(full: Tensor, boxes: Sequence[Box]) -> Boxed:
    """The boxes of ``full``, as views of it."""
    return Boxed(full.shape, full.dtype, boxes, lambda box: part(full, box))


def cut(shape: Sequence[int], pieces: int, rng: random.Random) -> list[Box]:
    """The whole of ``shape`` cut into up to ``pieces`` boxes that do not overlap, at random."""
    boxes: list[Box] = [((0,) * len(shape), tuple(shape))]
    for _ in range(pieces - 1):
        offsets, sizes = boxes.pop(rng.randrange(len(boxes)))
        splittable = [dim for dim, size in enumerate(sizes) if size > 1]
        if not splittable:
            boxes.append((offsets, sizes))
            continue
        dim = rng.choice(splittable)
        at = rng.randrange(1, sizes[dim])
        boxes.append((offsets, (*sizes[:dim], at, *sizes[dim + 1 :])))
        boxes.append(
            (
                (*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :]),
                (*sizes[:dim], sizes[dim] - at, *sizes[dim + 1 :]),
            )
        )
    return boxes
