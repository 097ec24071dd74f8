"""What a checkpoint consists of, as a pure value, and the JSON text that says so.

The text begins with the checksum of everything behind it. That rule and the fields ``format`` and ``version`` stay the
same in every version, so that a newer checkpoint is told from a damaged one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any

import torch
import xxhash

from lightning_gemini.core.errors import CorruptCheckpointError, IncompatibleCheckpointError, NotACheckpointError

#: The file that makes a folder a checkpoint.
MANIFEST_NAME = "checkpoint.json"

FORMAT = "lightning-gemini"
VERSION = 1

_SAVE_ID = re.compile(r"\d{8}T\d{12}-[0-9a-f]{8}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_CHECKSUM_FIELD = re.compile(rb'\{"checksum":"([0-9a-f]{16})",')
_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def new_save_id() -> str:
    """A fresh name for a save; names sort by the time (UTC) they were made at."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{token_hex(4)}"


def is_save_id(name: str) -> bool:
    """Whether ``name`` has the form of :func:`new_save_id`."""
    return _SAVE_ID.fullmatch(name) is not None


def is_file_name(name: str) -> bool:
    """Whether a file of a save may be called ``name``: ASCII letters, digits, ``_``, ``-`` and ``.``, no folders."""
    return _FILE_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, stored row by row (C order) in one file.

    Attributes:
        offsets: of the box's first element in the tensor, one for each dimension.
        shape: of the box.
        file: its name in the save's folder.
        start: of the piece in the file, in bytes.
        nbytes: of the piece.
        xxh3: the 64-bit XXH3 of its bytes, 16 hexadecimal digits.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int
    xxh3: str

    @property
    def end(self) -> int:
        return self.start + self.nbytes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint; its pieces do not overlap and fill it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredFile:
    """A file of a checkpoint.

    Attributes:
        nbytes: its length.
        xxh3: of the header where there is one, else of the whole file.
        header: the header's length in bytes for files of tensors, ``None`` for others.
    """

    nbytes: int
    xxh3: str
    header: int | None = None


@dataclass(frozen=True)
class Manifest:
    """All that is in a checkpoint but the bytes themselves.

    Attributes:
        save_id: the save that wrote it, and the name of the folder with its files.
        world_size: the ranks that wrote it.
        files: by name, in the save's folder.
        tensors: by fully qualified name, in the order in which rank 0 gave them.
        about: whatever else the writer wanted to say, as JSON.
        writer: the package's version, host and process id of rank 0, for messages.
    """

    save_id: str
    world_size: int
    files: Mapping[str, StoredFile]
    tensors: Mapping[str, StoredTensor]
    about: Mapping[str, Any] = field(default_factory=dict)
    writer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def attachments(self) -> tuple[str, ...]:
        """The names of the files that hold no tensors."""
        return tuple(name for name, file in self.files.items() if file.header is None)

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest's own."""
        return sum(file.nbytes for file in self.files.values())

    def encode(self) -> bytes:
        """The JSON text, one line of ASCII.

        Raises:
            TypeError, ValueError: ``about`` is not JSON.
        """
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "save_id": self.save_id,
            "writer": dict(self.writer),
            "world_size": self.world_size,
            "files": {name: _file_fields(file) for name, file in self.files.items()},
            "tensors": {name: _tensor_fields(tensor) for name, tensor in self.tensors.items()},
            "about": self.about,
        }
        text = json.dumps(fields, separators=(",", ":")).encode("ascii")
        return b'{"checksum":"%s",' % xxhash.xxh3_64_hexdigest(text).encode() + text[1:]


def decode_manifest(raw: bytes, where: str) -> Manifest:
    """The manifest that :meth:`Manifest.encode` wrote as ``raw``; ``where`` is its path, for messages.

    Raises:
        CorruptCheckpointError: not every byte is as it was written, or the parts do not fit each other.
        NotACheckpointError: it is some other program's JSON.
        IncompatibleCheckpointError: a newer version wrote it.
    """
    checksum = _CHECKSUM_FIELD.match(raw)
    sound = checksum is not None and checksum[1].decode() == xxhash.xxh3_64_hexdigest(b"{" + raw[checksum.end() :])
    if not sound:
        if _is_other_json(raw):
            raise NotACheckpointError(f"{where} was not written by this package: it has no checksum of ours.")
        raise CorruptCheckpointError(
            f"{where} is damaged: its {len(raw)} bytes do not have the checksum that was written with them. "
            "Use another checkpoint."
        )
    fields = json.loads(raw)
    if fields.get("format") != FORMAT:
        raise NotACheckpointError(f"{where} is of the format {fields.get('format')!r}, expected {FORMAT!r}.")
    if fields.get("version") != VERSION:
        raise IncompatibleCheckpointError(
            f"{where} has version {fields.get('version')!r} of the format, and this package reads version {VERSION}. "
            "Update lightning-gemini."
        )
    try:
        manifest = _from_fields(fields)
        check_manifest(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptCheckpointError(f"{where} is not formed as expected: {type(error).__name__}: {error}.") from error
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Checks that pieces fill their tensors and files, and that no name leads out of the checkpoint's folder.

    Raises:
        ValueError: they do not; the message says which.
    """
    problem = _contradiction(manifest)
    if problem:
        raise ValueError(problem)


def _file_fields(file: StoredFile) -> dict[str, Any]:
    return {"nbytes": file.nbytes, "xxh3": file.xxh3} | ({} if file.header is None else {"header": file.header})


def _tensor_fields(tensor: StoredTensor) -> dict[str, Any]:
    pieces = [
        {"offsets": p.offsets, "shape": p.shape, "file": p.file, "start": p.start, "nbytes": p.nbytes, "xxh3": p.xxh3}
        for p in tensor.pieces
    ]
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": tensor.shape, "pieces": pieces}


def _from_fields(fields: dict[str, Any]) -> Manifest:
    files = {n: StoredFile(f["nbytes"], f["xxh3"], f.get("header")) for n, f in fields["files"].items()}
    tensors = {
        name: StoredTensor(
            _DTYPES[tensor["dtype"]],
            tuple(tensor["shape"]),
            tuple(
                Piece(tuple(p["offsets"]), tuple(p["shape"]), p["file"], p["start"], p["nbytes"], p["xxh3"])
                for p in tensor["pieces"]
            ),
        )
        for name, tensor in fields["tensors"].items()
    }
    return Manifest(fields["save_id"], fields["world_size"], files, tensors, fields["about"], fields["writer"])


def _contradiction(manifest: Manifest) -> str | None:
    if not is_save_id(manifest.save_id):
        return f"{manifest.save_id!r} is no save id"
    for name in manifest.files:
        if not is_file_name(name):
            return f"{name!r} is no name for a file of a checkpoint"
    if any(file.header is not None and file.header < 0 for file in manifest.files.values()):
        return "a header has a negative length"
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name, f in manifest.files.items() if f.header is not None}
    for name, tensor in manifest.tensors.items():
        if sum(math.prod(piece.shape) for piece in tensor.pieces) != math.prod(tensor.shape):
            return f"the pieces of {name!r} do not fill its shape {tensor.shape}"
        for piece in tensor.pieces:
            if not _fits(piece, tensor):
                return f"a piece of {name!r} at {piece.offsets} does not fit the tensor's shape {tensor.shape}"
            parts[piece.file].append((piece.start, piece.end))
    for name, ranges in parts.items():
        end = manifest.files[name].header or 0
        for start, stop in sorted(ranges):
            if start != end:
                return f"the pieces in {name} do not follow one another at byte {end}"
            end = stop
        if end != manifest.files[name].nbytes:
            return f"the pieces in {name} end at byte {end}, and the file at {manifest.files[name].nbytes}"
    return None


def _fits(piece: Piece, tensor: StoredTensor) -> bool:
    if not len(piece.offsets) == len(piece.shape) == len(tensor.shape):
        return False
    inside = all(
        offset >= 0 and size >= 0 and offset + size <= full
        for offset, size, full in zip(piece.offsets, piece.shape, tensor.shape, strict=True)
    )
    return inside and piece.nbytes == math.prod(piece.shape) * tensor.dtype.itemsize


def _is_other_json(raw: bytes) -> bool:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    # a damaged one of ours has lost one of the two at most
    return not isinstance(fields, dict) or ("checksum" not in fields and fields.get("format") != FORMAT)
