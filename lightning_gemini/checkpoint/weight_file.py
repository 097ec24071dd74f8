"""A safetensors file of whole tensors, written in any order: each has its place from the start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_gemini.checkpoint.tensor_file import Entry, bytes_of, encode_header
from lightning_gemini.core.errors import IncompatibleCheckpointError

_HELD = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class _Whole(Entry):
    @property
    def key(self) -> str:
        return self.fqn


class WeightFile:
    """A new file at ``path`` for ``tensors`` (on ``meta``) by name, as ``safetensors.torch.save_file`` lays it out.

    Raises:
        IncompatibleCheckpointError: safetensors has no such dtype.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype not in _HELD:
                raise IncompatibleCheckpointError(f"{name} is {tensor.dtype}, which safetensors files cannot hold.")
        names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        shapes = {name: tuple(tensors[name].shape) for name in names}
        entries = [_Whole(name, tensors[name].dtype, (0,) * len(shapes[name]), shapes[name]) for name in names]
        header = encode_header(entries, {"format": "pt"})
        self._left: dict[str, tuple[Entry, int]] = {}
        end = len(header)
        for entry in entries:
            self._left[entry.fqn] = (entry, end)
            end += entry.nbytes
        self._file = path.open("xb")
        self._file.write(header)
        self._file.truncate(end)

    def write(self, name: str, tensor: Tensor) -> int:
        """Writes one tensor, in host memory, to its place; returns its bytes."""
        entry, start = self._left.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), name
        self._file.seek(start)
        self._file.write(bytes_of(tensor.detach().contiguous()))
        return entry.nbytes

    def close(self) -> None:
        """Ends the file, on the disk."""
        assert not self._left, self._left
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
