"""One file of ``torch.save`` whose tensors come one after the other and are never in memory together."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import types
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.serialization import skip_data
from typing_extensions import override

from lightning_gemini.checkpoint.output import replacing, with_checksums
from lightning_gemini.core.errors import CheckpointWriteError

# https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT: what lies where in a zip archive, in bytes
_DESCRIPTOR = b"PK\x07\x08"  # behind the bytes of a record; its checksum follows
_ENTRY = b"PK\x01\x02"  # of a record, in the directory
_ENTRY_CRC, _ENTRY_LENGTHS, _ENTRY_NAME = 16, 28, 46
_END_64, _END_64_SIZE, _END_BYTES = b"PK\x06\x06", 40, 56 + 20 + 22
_STORAGE = re.compile(rb"[^/]+/data/(\d+)")

_FAKE = FakeTensorMode()


def stand_in(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of host memory that takes none, for :func:`write_streamed`."""
    with _FAKE:
        return torch.empty(tuple(shape), dtype=dtype)


def write_streamed(
    checkpoint: Mapping[str, Any],
    path: str | os.PathLike[str],
    values: Callable[[Tensor], Tensor],
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes what ``write_full`` would if the stand-ins in ``checkpoint`` were what ``values`` returns for each.

    ``torch.save`` makes the file without the bytes of tensors (``torch.serialization.skip_data``); these are put in as
    the file is written from its beginning to its end, and their checksums where they belong. In memory are the rest
    and one tensor at a time.

    Args:
        values: called once for each stand-in, in the order of the file; the tensor has the same shape and dtype.
        progress: called with numbers of bytes of tensors that have been written.

    Raises:
        CheckpointWriteError: it could not be written; see :func:`replacing`.
    """
    with replacing(path) as file:
        layout = _Layout()
        tensors: list[Tensor] = []
        with skip_data(materialize_fake_tensors=True), with_checksums():
            torch.save(checkpoint, layout, pickle_module=_pickle_that_notes(tensors))  # type: ignore[arg-type]
        storages = _storages(tensors)
        if [size for size in layout.gaps if size] != [size for size, _ in storages if size]:
            raise CheckpointWriteError(
                f"{os.fspath(path)} could not be written: the checkpoint holds storages without a tensor."
            )
        filled = iter([tensor for size, tensor in storages if size])
        checksums: list[int] = []
        for part in layout.parts[:-1]:
            if isinstance(part, int):
                checksums.append(_write_tensor(file, next(filled), values, progress))
            else:
                file.write(_with_descriptor(part, checksums))
        last = layout.parts[-1]
        assert isinstance(last, bytearray)
        by_number = iter(checksums)
        _set_checksums(last := _with_descriptor(last, checksums), [next(by_number) if s else 0 for s, _ in storages])
        file.write(last)


class _Layout(io.RawIOBase):
    """What ``torch.save`` writes under ``skip_data``: bytes, and gaps that it jumps over."""

    def __init__(self) -> None:
        self.parts: list[bytearray | int] = [bytearray()]

    @property
    def gaps(self) -> list[int]:
        return [part for part in self.parts if isinstance(part, int)]

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, data: Any) -> int:
        if isinstance(self.parts[-1], int):
            self.parts.append(bytearray())
        last = self.parts[-1]
        assert isinstance(last, bytearray)
        last += memoryview(data).cast("B")
        return len(data)

    @override
    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_CUR or offset < 0:
            raise io.UnsupportedOperation("only gaps of a known size are expected")
        if offset:
            self.parts.append(offset)
        return 0


def _pickle_that_notes(tensors: list[Tensor]) -> types.SimpleNamespace:
    """The module ``pickle``, for ``torch.save``, which appends every tensor in the order in which it comes to them."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: object) -> Any:
            if isinstance(value, Tensor):
                tensors.append(value)
            return NotImplemented

    return types.SimpleNamespace(__name__="pickle", Pickler=Pickler)


def _storages(tensors: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """Bytes of each storage and the first tensor in it; ``torch.save`` numbers storages as it meets them."""
    found: dict[int, tuple[int, Tensor]] = {}
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):
            continue  # made of other tensors, which come as well
        found.setdefault(storage._cdata, (storage.nbytes(), tensor))
    return list(found.values())


def _write_tensor(
    file: io.RawIOBase, tensor: Tensor, values: Callable[[Tensor], Tensor], progress: Callable[[int], None]
) -> int:
    """Writes the storage of a tensor; its CRC-32."""
    if isinstance(tensor, FakeTensor):
        value = values(tensor)
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise ValueError(f"expected {tensor.dtype} of {tuple(tensor.shape)}, got {value.dtype} of {value.shape}")
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    else:
        data = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage().cpu())
    view = memoryview(data.numpy())  # type: ignore[arg-type]
    file.write(view)
    progress(len(view))
    return zlib.crc32(view)


def _with_descriptor(part: bytearray, checksums: Sequence[int]) -> bytearray:
    """The bytes behind a record, with its checksum."""
    if checksums:
        if not part.startswith(_DESCRIPTOR):
            raise ValueError("this version of torch writes files in a way that is not known")
        struct.pack_into("<I", part, len(_DESCRIPTOR), checksums[-1])
    return part


def _set_checksums(part: bytearray, checksums: Sequence[int]) -> None:
    """Puts the checksums of storages, by number, into the directory with which ``part`` ends."""
    for start, name in _entries(part):
        if found := _STORAGE.fullmatch(name):
            struct.pack_into("<I", part, start + _ENTRY_CRC, checksums[int(found[1])])


def _entries(part: bytearray) -> Iterator[tuple[int, bytes]]:
    """Where each entry of the directory begins, and its record's name."""
    end = len(part) - _END_BYTES
    if part[end : end + 4] != _END_64:
        raise ValueError("this version of torch writes files in a way that is not known")
    (size,) = struct.unpack_from("<Q", part, end + _END_64_SIZE)
    start = end - size
    while start < end:
        if part[start : start + 4] != _ENTRY:
            raise ValueError("this version of torch writes files in a way that is not known")
        lengths = struct.unpack_from("<HHH", part, start + _ENTRY_LENGTHS)
        yield start, bytes(part[start + _ENTRY_NAME : start + _ENTRY_NAME + lengths[0]])
        start += _ENTRY_NAME + sum(lengths)
