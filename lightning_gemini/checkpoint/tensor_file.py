"""The safetensors file format: a header that says what lies where, then the bytes of all pieces.

https://github.com/huggingface/safetensors#format. Its own writer wants every tensor in memory at once, so this one
makes the header alone, and the pieces are written behind it one after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: What names of such files end with.
TENSORS_SUFFIX = ".safetensors"

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # what safetensors reads
_METADATA_KEY = "__metadata__"

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Entry:
    """A box of a tensor as a header lists it."""

    fqn: str
    dtype: torch.dtype
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def key(self) -> str:
        """The name in the file: the tensor's, and in brackets the box, as in ``weight[0:2,4:8]``.

        The box is always there, so that no two pieces of any two tensors have the same name, whatever the tensors are
        called.
        """
        box = ",".join(f"{start}:{start + size}" for start, size in zip(self.offsets, self.shape, strict=True))
        return f"{self.fqn}[{box}]"


def encode_header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file in which the entries' bytes follow in the order given.

    Of dtypes that safetensors does not know (complex128, say) it lists the bytes: ``U8``, with one more dimension.

    Raises:
        ValueError: there are more entries than a header has room for, or a name is not valid Unicode.
    """
    fields: dict[str, Any] = {_METADATA_KEY: dict(metadata)}
    end = 0
    for entry in entries:
        code = _CODES.get(entry.dtype)
        fields[entry.key] = {
            "dtype": code or "U8",
            "shape": [*entry.shape] if code else [*entry.shape, entry.dtype.itemsize],
            "data_offsets": [end, end + entry.nbytes],
        }
        end += entry.nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    # the first piece begins at a multiple of 8, where readers can view it as any dtype
    text += b" " * (-len(text) % _LENGTH_BYTES)
    if len(text) > _LONGEST_HEADER:
        raise ValueError(
            f"{len(fields) - 1} pieces of tensors need a header of {len(text)} bytes, and safetensors allows "
            f"{_LONGEST_HEADER}. Save from more ranks, or with larger chunks."
        )
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU as bytes, one-dimensional; writing to them writes to the tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def header_metadata(header: bytes) -> dict[str, str]:
    """What ``encode_header`` was given as ``metadata``; empty where ``header`` is not sound enough to tell."""
    try:
        fields = json.loads(header[_LENGTH_BYTES:])
        return {str(key): str(value) for key, value in fields[_METADATA_KEY].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
