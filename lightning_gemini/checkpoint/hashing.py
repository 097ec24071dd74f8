"""Checksums of what is written and read, taken block by block while a block is in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import xxhash

from lightning_gemini.checkpoint.folder import InFile, OutFile

#: Bytes that are hashed and then written, or read and then hashed, at a time.
BLOCK_BYTES = 2**20


def checksum(data: bytes | memoryview) -> str:
    """The XXH3 (64 bits) of ``data`` as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def write_hashed(file: OutFile, parts: Iterable[memoryview]) -> str:
    """Appends ``parts`` (bytes, one-dimensional), one after the other, and returns the checksum of all."""
    digest = xxhash.xxh3_64()
    for part in parts:
        for block in _blocks(part):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def read_parts(file: InFile, start: int, nbytes: int, parts: Iterable[tuple[int, memoryview]]) -> str:
    """The checksum of a part of a file, of which only some bytes are kept; the others pass through one block.

    Args:
        start, nbytes: of the part of the file.
        parts: where bytes go: the first one, counted from ``start``, and their memory (bytes, one-dimensional); in
            order, without overlaps.

    Raises:
        EOFError: the file ends before.
    """
    digest = xxhash.xxh3_64()
    at = 0

    def read(target: memoryview) -> None:
        nonlocal at
        for block in _blocks(target):
            file.read_into(block, start + at)
            digest.update(block)
            at += len(block)

    spare = memoryview(b"")
    for first, target in [*parts, (nbytes, memoryview(b""))]:
        while at < first:
            spare = spare or memoryview(bytearray(min(BLOCK_BYTES, nbytes)))
            read(spare[: first - at])
        read(target)
    return digest.hexdigest()


def hash_range(file: InFile, start: int, nbytes: int, progress: Callable[[int], None]) -> str:
    """The checksum of a part of a file, of which one block is in memory at a time; ``progress`` is told its bytes.

    Raises:
        EOFError: the file ends before.
    """
    digest = xxhash.xxh3_64()
    buffer = memoryview(bytearray(min(BLOCK_BYTES, nbytes)))
    for at in range(start, start + nbytes, BLOCK_BYTES):
        block = buffer[: start + nbytes - at]
        file.read_into(block, at)
        digest.update(block)
        progress(len(block))
    return digest.hexdigest()


def _blocks(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(data), BLOCK_BYTES):
        yield data[start : start + BLOCK_BYTES]
