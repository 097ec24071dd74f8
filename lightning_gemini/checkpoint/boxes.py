"""Boxes: how a run of elements of a tensor looks to torch.distributed.checkpoint, which knows n-dimensional blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """A block of a tensor: ``offsets`` and ``sizes`` in its dimensions, and ``first``, its first element in memory."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int


def boxes(shape: Sequence[int], stride: Sequence[int], start: int, stop: int) -> list[Box]:
    """The blocks that make up the elements ``start:stop`` of a dense tensor, in the order of its memory.

    At most two for each dimension but one: the end of a row, whole rows and the beginning of a row, and the same again
    for parts of rows.

    Args:
        shape: of the tensor.
        stride: of the tensor in elements; dense, so some order of the dimensions is row-major.
        start, stop: in elements of its memory.
    """
    order = sorted(range(len(shape)), key=lambda dim: (-stride[dim], shape[dim] > 1, dim))
    back = sorted(range(len(order)), key=order.__getitem__)
    found = _row_major([shape[dim] for dim in order], start, stop) if start < stop else ()
    return [
        Box(tuple(offsets[at] for at in back), tuple(sizes[at] for at in back), first)
        for offsets, sizes, first in found
    ]


def _row_major(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[list[int], list[int], int]]:
    if not shape:
        yield [], [], start
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _within(shape, last, row, start, stop)
        return
    if start < first * row:
        yield from _within(shape, first - 1, row, start, first * row)
    if first < last:
        yield [first, *[0] * (len(shape) - 1)], [last - first, *shape[1:]], first * row
    if last * row < stop:
        yield from _within(shape, last, row, last * row, stop)


def _within(
    shape: Sequence[int], index: int, row: int, start: int, stop: int
) -> Iterator[tuple[list[int], list[int], int]]:
    """The part ``start:stop`` of row number ``index``, which has ``row`` elements."""
    base = index * row
    for offsets, sizes, first in _row_major(shape[1:], start - base, stop - base):
        yield [index, *offsets], [1, *sizes], base + first
